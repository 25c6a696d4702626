"""graph_dump: a folder per compiled graph in which one can read what the compiler did, its index first."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from pathlib import Path
from pprint import pformat

from tabulate import tabulate

from tide_compile import passes
from tide_compile.errors import ConfigError
from tide_compile.files import write_text
from tide_compile.inspection.graph_report import GraphReport
from tide_compile.inspection.graph_source import source_of
from tide_compile.inspection.plan_chart import write_chart
from tide_compile.inspection.plan_page import plan_page
from tide_compile.passes.plan import Plan
from tide_compile.passes.program import Program
from tide_compile.passes.run import PassEvent
from tide_compile.torch_internals.fx import without_modes

log = logging.getLogger("tide_compile")

INDEX = "00_index.txt"  # of a graph's folder
CONTENTS = "00_index.md"  # of all graphs
_PASSES = {f.__name__: f for f in (*passes.ANALYSES, *passes.PLACEMENT, *passes.REWRITES)}


class GraphDump:
    """An observer that writes into the next free ``graph_NN`` below ``root``, where ``00_index.md`` lists these.

    Files: ``00_index.txt`` (this list), ``plan.txt`` (a line per layer), ``plan.html`` (a picture), ``plan.dot`` and
    ``plan.graphml`` (for drawing programs), ``NN_<pass>.py`` (the graph after each pass, runnable) and
    ``inductor.txt`` (where the final code of each piece lies).
    """

    def __init__(self, root: str | Path) -> None:
        self.folder = _next_folder(Path(root))
        self.report = GraphReport()
        self._files: list[tuple[str, str]] = []
        self._code: list[tuple[str, str]] = []
        self._plan = Plan()

    def __call__(self, event: PassEvent) -> None:
        self.report(event)
        step = self.report.steps[-1]
        found = {f.name: getattr(event.plan, f.name) for f in fields(Plan) if f.name != "settings"}
        new = {n: v for n, v in found.items() if v is not getattr(self._plan, n)}
        self._plan = event.plan
        about = [f"{event.name}: {step}", inspect.getdoc(_PASSES[event.name]), *map(_found, new, new.values())]
        name = f"{len(self.report.steps):02d}_{event.name}.py"
        write_text(self.folder / name, source_of(event.program, "\n\n".join(about)))
        self._list(name, str(step))

    def planned(self, program: Program, plan: Plan) -> None:
        """The passes are done, and nothing is compiled yet."""
        self.report.planned(program, plan)
        write_text(self.folder / "plan.txt", f"{self.report.summary()}\n\n{self.report.table()}\n")
        write_chart(self.report, self.folder)
        self._list("plan.txt", "the plan, a line per layer")
        self._list("plan.dot, plan.graphml", "which piece runs after which, for drawing programs")
        self.draw()
        self._list("plan.html", "the same as a picture")

    def draw(self, **measured: object) -> None:
        """``plan.html``, with the exits and times in ``measured`` (see ``plan_page``)."""
        write_text(self.folder / "plan.html", plan_page(self.report, **measured))

    def compiled(self, piece: str, files: list[str]) -> None:
        """Inductor has compiled ``piece``, now or long after the passes, into ``files``."""
        self._code += [(piece, file) for file in files or ["(no code of its own)"]]
        pieces = {p.name: p.twin_of for p in self.report.pieces}
        rows = [*self._code, *((n, f"as {twin}") for n, twin in pieces.items() if twin is not None)]
        later = [n for n in pieces if n not in {name for name, _ in rows}]
        rows += [(n, "compiled when it is first needed") for n in later]
        write_text(self.folder / "inductor.txt", tabulate(rows, ["piece", "file"]) + "\n")
        self._list("inductor.txt", "where Inductor's code of each piece lies")

    def failed(self, error: Exception) -> None:
        """The graph is not cut, because of ``error``."""
        self.report.error = f"{type(error).__name__}: {error}"
        self._write_index()

    def _list(self, name: str, what: str) -> None:
        if (name, what) not in self._files:
            self._files.append((name, what))
            self._write_index()

    def _write_index(self) -> None:
        head = self.report.summary() if self.report.error or self.report.layers else "the passes are at work"
        text = f"{head}\n\n{tabulate(self._files, ['file', 'what'], tablefmt='plain')}\n"
        write_text(self.folder / INDEX, text)
        write_contents(self.folder.parent)


def write_contents(root: Path) -> None:
    """List the graphs that lie in ``root``, of this run and of earlier ones, with what each is."""
    rows = []
    for index in sorted(root.glob(f"graph_*/{INDEX}")):
        folder, about = index.parent, index.read_text().split("\n\n")[0].replace("\n", "; ").replace("|", "/")
        links = [f"[index]({folder.name}/{INDEX})"]
        links += [f"[{n}]({folder.name}/{n})" for n in ("plan.txt", "plan.html") if (folder / n).is_file()]
        rows.append((folder.name, about, ", ".join(links)))
    table = tabulate(rows, ["folder", "graph", "begin with"], tablefmt="github")
    head = "A folder for each graph that was compiled. [B, S, H]: S = 1 is the decoding of one token, else a prompt."
    write_text(root / CONTENTS, f"# Graphs\n\n{head}\n\n{table}\n")


_open_dumps: ContextVar[tuple[tuple[Path, list[GraphDump]], ...]] = ContextVar("tide_dumps", default=())


@contextmanager
def dump(folder: str | Path) -> Iterator[list[GraphDump]]:
    """Write what is compiled inside the block (of this thread or task) into ``folder``, a folder per graph.

    Yields:
        The dumps, one more for each graph that is compiled.

    What was compiled before is not compiled again, so nothing is written of it; that is logged.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    dumps: list[GraphDump] = []
    token = _open_dumps.set((*_open_dumps.get(), (_writable(folder), dumps)))
    try:
        yield dumps
    finally:
        _open_dumps.reset(token)
    if not dumps:
        log.warning(
            "nothing was compiled inside dump(%r), so nothing was written: the model was compiled before. Call "
            "torch._dynamo.reset() first, or open the block around the first call.",
            str(folder),
        )


def new_dumps(option: object) -> list[GraphDump]:
    """The dumps for a graph that is about to be compiled: of the option ``dump`` and of the blocks around."""
    if option is not None and not isinstance(option, str | Path):
        raise ConfigError(f"dump={option!r} is not allowed: give a folder.")
    made = [] if option is None else [GraphDump(_writable(option))]
    for folder, dumps in _open_dumps.get():
        dumps.append(GraphDump(folder))
        made.append(dumps[-1])
    return made


def _writable(folder: str | Path) -> Path:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{str(folder)!r} cannot be made a folder for the dump: {error}.") from error
    return Path(folder)


def _next_folder(root: Path) -> Path:
    for number in range(10_000):
        folder = root / f"graph_{number:02d}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise ConfigError(f"{str(root)!r} holds 10,000 graphs: give an empty folder.")


def _found(name: str, value: object) -> str:
    with without_modes():
        return f"{name} = {pformat(value, width=110, compact=True)}"

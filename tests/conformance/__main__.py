"""python -m tests.conformance: every call of generate, in every way to compile a model, against stock transformers.

Each parameter of ``generate`` and each field of ``GenerationConfig`` has cases, found by introspection: one that has
none is an error. A case is run by ``TIDE(model).generate`` (engine), ``torch.compile(model, backend="tide").generate``
and ``model.compile(backend="tide")``, then ``model.generate``; with exits off and with synthetic ones at two of three
layers; for one prompt and for three, of which two are padded on the left. Right is what stock transformers returns, or
with exits the eager reference: the same tokens, and scores, logits, states and attentions within rounding, the same
calls of callbacks, the same error; or a named error of tide. All that is asked of the logits of a row that has ended is
that they are numbers. Graphs are interpreted (``lowering="eager"``), so that what is compared are calls, not kernels.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from tabulate import tabulate

from bench.support.report import machine
from tests.conformance.cases import undecided
from tests.conformance.matrix import MODELS, WAYS, Row, examine_all
from tests.conformance.outcomes import EQUAL, WRONG
from tide_compile.files import write_text


def summary(rows: list[tuple[str, Row]]) -> str:
    counts = Counter(row.verdict for _, row in rows)
    cases = len({(model, row.covers, row.case) for model, row in rows})
    told = ", ".join(f"{counts[name]:,} {name}" for name in (EQUAL, "named error", WRONG))
    return f"{cases} cases, {len(rows):,} calls: {told}."


def table(rows: list[tuple[str, Row]]) -> str:
    """One line for each case: what all of its calls came to, by way."""
    cases: dict[tuple, list[Row]] = {}
    for model, row in rows:
        cases.setdefault((model, row.covers, row.case), []).append(row)
    lines = [[*_about(key), *(_cell(found, way) for way in WAYS), _remarks(found)] for key, found in cases.items()]
    headers = ["model", "about", "case", *WAYS, "remarks"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True, stralign=None)


def _about(key: tuple[str, tuple[str, ...], str]) -> list[str]:
    model, covers, case = key
    return [model, ", ".join(covers), case.replace("|", "\\|")]


def _cell(rows: list[Row], way: str) -> str:
    counts = Counter(row.verdict for row in rows if row.way == way)
    return " / ".join(counts) if len(counts) == 1 else " / ".join(f"{n} {name}" for name, n in counts.items())


def _remarks(rows: list[Row]) -> str:
    return "; ".join(dict.fromkeys(row.why for row in rows if row.why)).replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="default: all")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--markdown", type=Path, help="write the matrix to this file")
    arguments = parser.parse_args()
    if undecided():
        parser.exit(1, f"no case is about {', '.join(undecided())}: add one to tests/conformance/cases.py\n")
    rows = examine_all(arguments.models, arguments.processes)
    print(f"{machine()}\n{summary(rows)}")
    wrong = [f"{model}: {row}" for model, row in rows if row.verdict == WRONG]
    print("\n".join(wrong))
    if arguments.markdown:
        title, about = __doc__.split(":", 1)[1].strip().split("\n\n", 1)
        command = "python -m tests.conformance --markdown docs/conformance.md"
        models = "\n".join(f"* {name}: {model.about}" for name, model in MODELS.items())
        parts = (f"# Conformance: {title}", about, models, f"`{command}` on {machine()}.", summary(rows), table(rows))
        write_text(arguments.markdown, "\n\n".join(parts) + "\n")
    parser.exit(bool(wrong))


if __name__ == "__main__":
    main()

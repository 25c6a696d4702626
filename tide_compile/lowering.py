"""Lowering: every distinct piece of a program is compiled once, by Inductor."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

import torch
import torch.utils.cpp_extension  # imports setuptools, which fails once a package has imported the stdlib's distutils
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

from tide_compile.passes.fx_tools import call, structure_key, value_of
from tide_compile.passes.lower_attention import LowerAttention
from tide_compile.passes.lower_linears import Form, Linear, LowerLinears, find_linears
from tide_compile.passes.plan import ROWS, Piece, Program
from tide_compile.tuning import fastest_forms

log = logging.getLogger("tide_compile")

Runnable = Callable[..., tuple]


def lower(program: Program, lowering: str, mode: str | None = None) -> dict[str, Runnable]:
    """Compile a program's pieces.

    Layers repeat, so most pieces have twins: graphs that are equal but for names. Weights and caches are inputs, so
    one compiled piece serves all its twins. Pieces that only run once a token has left are compiled when they are
    first run, or by ``Lazy.compile``.

    Args:
        program: what ``passes.run`` returned. Its graphs are consumed.
        lowering: ``"inductor"``, or ``"eager"`` to interpret the graphs.
        mode: Inductor's mode (``"reduce-overhead"``, ``"max-autotune"``), or None.

    Returns:
        The callable of each piece, by name.
    """
    if lowering == "eager":
        return {name: piece.graph for name, piece in program.pieces.items()}
    patches = torch._inductor.list_mode_options(mode) if mode else {}
    forms = fastest_forms(set().union(*(find_linears(p.graph.graph) for p in program.pieces.values())))
    compiled: dict[str, Runnable] = {}
    runnables = {}
    started = time.perf_counter()
    keys = {name: structure_key(piece.graph) for name, piece in program.pieces.items()}  # compiling changes graphs
    for name, piece in program.pieces.items():
        key = keys[name]
        if key not in compiled:
            patch = patches | _linears(piece, forms)
            compiled[key] = Lazy(piece, patch) if _is_later(name) else _compile(piece, patch)
        runnables[name] = compiled[key]
    log.info(
        "compiled %d distinct of %d pieces in %.1f s",
        len(compiled),
        len(runnables),
        time.perf_counter() - started,
    )
    return runnables


def _is_later(name: str) -> bool:
    """Whether a piece runs only when a token has left."""
    return name.startswith(("fill_", "project_")) or name.endswith((".masked", ".compact"))


def _linears(piece: Piece, forms: dict[Linear, Form]) -> dict[str, object]:
    chosen = {linear: forms[linear] for linear in find_linears(piece.graph.graph) & forms.keys()}
    return {"post_grad_custom_pre_pass": [LowerLinears(chosen), LowerAttention()]}


def _compile(piece: Piece, patches: dict[str, object]) -> Runnable:
    inputs = [_canonical(value_of(n)) for n in piece.graph.graph.find_nodes(op="placeholder")]
    mode = next(v.fake_mode for v in inputs if isinstance(v, torch.Tensor))
    with tracing(
        TracingContext(mode)
    ):  # Dynamo has put a fresh fake mode in its own context; the graph's values have theirs
        return compile_fx(piece.graph, inputs, config_patches=patches)


class Lazy:
    """A piece that is compiled when it is first run.

    Sizes that are not constants need guards, and those of the whole graph are closed by then: such a piece is compiled
    by ``torch.compile``, which brings its own.
    """

    def __init__(self, piece: Piece, patches: dict[str, object]) -> None:
        self._kept = _read_sizes(piece.graph)
        self._piece, self._patches, self._run = piece, patches, None
        values = [value_of(n) for n in piece.graph.graph.find_nodes(op="placeholder")]
        self._dynamic = {i: sizes for i, v in enumerate(values) if (sizes := _symbolic_sizes(v))}
        self._guarded = bool(self._dynamic) or any(isinstance(v, torch.SymInt) for v in values)
        inputs = [piece.inputs[i] for i in self._kept]
        self._rows = inputs.index(ROWS) if ROWS in inputs else None
        self._lock = threading.Lock()

    def __call__(self, *arguments: object) -> tuple:
        arguments = [arguments[i] for i in self._kept]
        if self._run is None:
            with self._lock:
                self._run = self._run or self._compile(arguments)
        if self._rows is not None:
            torch._dynamo.mark_dynamic(arguments[self._rows], arguments[self._rows].dim() - 1)
        return self._run(*arguments)

    def _compile(self, arguments: list[object]) -> Runnable:
        started = time.perf_counter()
        if not self._guarded and self._rows is None:
            run = _compile(self._piece, self._patches)
        else:  # in a module of its own: Dynamo skips code that was generated while it compiled
            module = GraphModule(self._piece.graph, self._piece.graph.graph)
            run = torch.compile(module.forward, fullgraph=True, options=self._patches)
            for position, sizes in self._dynamic.items():
                torch._dynamo.maybe_mark_dynamic(arguments[position], sizes)
        log.info("compiled a piece on its first run in %.1f s", time.perf_counter() - started)
        return run


def _read_sizes(gm: GraphModule) -> list[int]:
    """Let a graph read the sizes that it is given as numbers from its tensors instead, if they are there, because
    ``torch.compile`` takes a number for a constant until it changes. Returns the positions of the inputs that are left.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    numbers = {n: value_of(n).node.expr for n in placeholders if isinstance(value_of(n), torch.SymInt)}
    tensors = [n for n in placeholders if isinstance(value_of(n), torch.Tensor)]
    first = next(n for n in gm.graph.nodes if n.op != "placeholder")
    kept = []
    for position, node in enumerate(placeholders):
        at = next(
            ((t, d) for t in tensors for d in _symbolic_sizes(value_of(t)) if node in numbers
             and value_of(t).shape[d].node.expr == numbers[node]), None,
        )  # fmt: skip
        if at is None:
            kept.append(position)
            continue
        with gm.graph.inserting_before(first):
            size = call(gm.graph, "size", *at)
        node.replace_all_uses_with(size)
        gm.graph.erase_node(node)
    gm.recompile()
    return kept


def _symbolic_sizes(value: object) -> list[int]:
    if not isinstance(value, torch.Tensor):
        return []
    return [d for d, size in enumerate(value.shape) if isinstance(size, torch.SymInt)]


def _canonical(value: object) -> object:
    """The same fake value in terms of the symbols that stand for their equals.

    Dynamo may have learnt that two sizes are equal after it had named both. Inductor would bind the old name of an
    input and use the other, which in the whole graph another input binds, but in a piece maybe none.
    """
    if isinstance(value, torch.SymInt):
        return value.node.shape_env.create_symintnode(value.node.expr, hint=value.node.hint)
    if isinstance(value, torch.Tensor) and any(isinstance(s, torch.SymInt) for s in (*value.shape, *value.stride())):
        shape, stride = (tuple(map(_canonical, sizes)) for sizes in (value.shape, value.stride()))
        with value.fake_mode:
            return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
    return value


def compile_whole(gm: GraphModule, example_inputs: Sequence[object], mode: str | None) -> Runnable:
    """The graph as stock ``torch.compile`` would lower it."""
    patches = torch._inductor.list_mode_options(mode) if mode else None
    return compile_fx(gm, list(example_inputs), config_patches=patches)

"""Lowering: every distinct piece of a program is compiled once, by Inductor."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
import torch.utils.cpp_extension  # imports setuptools, which fails once a package has imported the stdlib's distutils
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

from tide_compile.passes.fx_tools import structure_key, value_of
from tide_compile.passes.plan import ROWS, Piece, Program

log = logging.getLogger("tide_compile")

Runnable = Callable[..., tuple]


def lower(program: Program, lowering: str, mode: str | None = None) -> dict[str, Runnable]:
    """Compile a program's pieces.

    Layers repeat, so most pieces have twins: graphs that are equal but for names. Weights and caches are inputs, so
    one compiled piece serves all its twins. Compact segments are compiled when they are first run, by
    ``torch.compile``: the number of their rows is a size of its own, which needs guards.

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
    plain = {n: v for n, v in patches.items() if n != "triton.cudagraphs"}  # a CUDA graph per number of rows is no use
    compiled: dict[str, Runnable] = {}
    runnables = {}
    started = time.perf_counter()
    for name, piece in program.pieces.items():
        key = structure_key(piece.graph)
        if key not in compiled:
            compiled[key] = _Later(piece, plain) if name.endswith(".compact") else _compile(piece, patches)
        runnables[name] = compiled[key]
    log.info(
        "compiled %d distinct of %d pieces in %.1f s",
        len(compiled),
        len(runnables),
        time.perf_counter() - started,
    )
    return runnables


def _compile(piece: Piece, patches: dict[str, object]) -> Runnable:
    inputs = [_canonical(value_of(n)) for n in piece.graph.graph.find_nodes(op="placeholder")]
    mode = next(v.fake_mode for v in inputs if isinstance(v, torch.Tensor))
    _hand_on_static_addresses(piece.graph)
    with tracing(
        TracingContext(mode)
    ):  # Dynamo has put a fresh fake mode in its own context; the graph's values have theirs
        return compile_fx(piece.graph, inputs, config_patches=patches or None)


def _hand_on_static_addresses(gm: GraphModule) -> None:
    """Let Inductor see which inputs Dynamo found at fixed addresses (parameters, static caches): CUDA graphs read those
    where they are, copy all others first, and give up on a graph that writes into any other.

    AOTAutograd looks for ``_dynamo_static_input_type`` only in graphs that look as if they came from Dynamo.
    """
    gm.meta.setdefault("dynamo_compile_id", None)
    gm._param_name_to_source = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        node._dynamo_source = None


class _Later:
    """A piece that is compiled by ``torch.compile`` when it is first run."""

    def __init__(self, piece: Piece, patches: dict[str, object]) -> None:
        self._piece, self._patches, self._run = piece, patches, None
        values = [value_of(n) for n in piece.graph.graph.find_nodes(op="placeholder")]
        self._dynamic = {i: sizes for i, v in enumerate(values) if (sizes := _symbolic_sizes(v))}
        self._rows = piece.inputs.index(ROWS)

    def __call__(self, *arguments: object) -> tuple:
        if self._run is None:  # in a module of its own: Dynamo skips code that was generated while it compiled
            module = GraphModule(self._piece.graph, self._piece.graph.graph)
            self._run = torch.compile(module.forward, fullgraph=True, options=self._patches or None)
            for position, sizes in self._dynamic.items():
                torch._dynamo.maybe_mark_dynamic(arguments[position], sizes)
        torch._dynamo.mark_dynamic(arguments[self._rows], arguments[self._rows].dim() - 1)
        return self._run(*arguments)


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

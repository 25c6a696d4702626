"""Compiled pieces: at once, or when they are first run."""

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

from tide_compile.inductor_code import keeping_buffers
from tide_compile.passes.fx_tools import call, value_of
from tide_compile.passes.plan import ROWS, Piece

log = logging.getLogger("tide_compile")

Runnable = Callable[..., tuple]

PATCHES = {
    "cpp.enable_floating_point_contract_flag": "fast",  # one instruction for a product and its sum
    "size_asserts": False,  # of every input of every piece in every call; Dynamo's guards have seen the model's
}
_STATIC = "_dynamo_static_input_type"


def compile_whole(gm: GraphModule, example_inputs: Sequence[object], mode: str | None) -> Runnable:
    """The graph as stock ``torch.compile`` would lower it."""
    patches = torch._inductor.list_mode_options(mode) if mode else None
    return compile_fx(gm, list(example_inputs), config_patches=patches)


def compile_piece(piece: Piece, patches: dict[str, object]) -> Runnable:
    """The piece compiled by Inductor now, within the guards of the graph it comes from."""
    inputs = [_canonical(value_of(n)) for n in piece.graph.graph.find_nodes(op="placeholder")]
    if patches.get("triton.cudagraphs"):
        _hand_on_static_addresses(piece.graph)
    return compile_graph(piece.graph, inputs, patches)


def compile_graph(gm: GraphModule, inputs: Sequence[object], patches: dict[str, object] | None = None) -> Runnable:
    """A graph compiled by Inductor for these fake inputs."""
    mode = next(v.fake_mode for v in inputs if isinstance(v, torch.Tensor))
    # Dynamo has put a fresh fake mode in its own context; the graph's values have theirs
    with tracing(TracingContext(mode)), keeping_buffers():
        return compile_fx(gm, list(inputs), config_patches=PATCHES | (patches or {}))


def _hand_on_static_addresses(gm: GraphModule) -> None:
    """Let Inductor see which inputs Dynamo found at fixed addresses (parameters, static caches): CUDA graphs read those
    where they are, copy all others first, and give up on a graph that writes into any other.

    AOTAutograd looks for ``_dynamo_static_input_type`` only in graphs that look as if they came from Dynamo.
    """
    gm.meta.setdefault("dynamo_compile_id", None)
    gm._param_name_to_source = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        node._dynamo_source = None


class Lazy:
    """A piece that is compiled when it is first run.

    Sizes that are not constants need guards, and those of the whole graph are closed by then: such a piece is compiled
    by ``torch.compile``, which brings its own.
    """

    def __init__(self, piece: Piece, patches: dict[str, object]) -> None:
        self._kept = _read_sizes(piece.graph)
        self._fewer = len(self._kept) < len(piece.inputs)
        self._piece, self._patches, self._run = piece, patches, None
        values = [value_of(n) for n in piece.graph.graph.find_nodes(op="placeholder")]
        self._dynamic = {i: sizes for i, v in enumerate(values) if (sizes := _symbolic_sizes(v))}
        self._guarded = bool(self._dynamic) or any(isinstance(v, torch.SymInt) for v in values)
        inputs = [piece.inputs[i] for i in self._kept]
        self._rows = inputs.index(ROWS) if ROWS in inputs else None
        self._lock = threading.Lock()

    def __call__(self, *arguments: object) -> tuple:
        if self._fewer:
            arguments = [arguments[i] for i in self._kept]
        if self._run is None:
            with self._lock:
                self._run = self._run or self._compile()
            arguments = [_marked(a, self._dynamic[i]) if i in self._dynamic else a for i, a in enumerate(arguments)]
        if self._rows is not None:
            torch._dynamo.mark_dynamic(arguments[self._rows], arguments[self._rows].dim() - 1)
        return self._run(*arguments)

    def _compile(self) -> Runnable:
        started = time.perf_counter()
        if not self._guarded and self._rows is None:
            run = compile_piece(self._piece, self._patches)
        else:  # in a module of its own: Dynamo skips code that was generated while it compiled
            module = GraphModule(self._piece.graph, self._piece.graph.graph)
            run = torch.compile(module.forward, fullgraph=True, options=PATCHES | self._patches)
        log.info("compiled a piece on its first run in %.1f s", time.perf_counter() - started)
        return run


def _marked(tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """The same memory with dynamic sizes: on the caller's own tensor, such as one of its cache, guards see the mark."""
    alias = tensor.detach()
    if hasattr(tensor, _STATIC):
        setattr(alias, _STATIC, getattr(tensor, _STATIC))
    torch._dynamo.maybe_mark_dynamic(alias, sizes)
    return alias


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

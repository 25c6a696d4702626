"""LazyPiece: a piece that is compiled when it is first run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence

import torch
from torch.fx import GraphModule

from tide_compile.lowering.compile_piece import PATCHES, Runnable, compile_piece
from tide_compile.passes.graph.fx_tools import call, value_of
from tide_compile.passes.program import ROWS, Piece
from tide_compile.torch_internals.dynamo import copy_marks, mark_dynamic, maybe_mark_dynamic

log = logging.getLogger("tide_compile")


class LazyPiece:
    """A piece that is compiled when it is first run.

    Sizes that are not constants need guards, and those of the whole graph are closed by then: such a piece is compiled
    by ``torch.compile``, which brings its own.
    """

    def __init__(self, piece: Piece, patches: Mapping[str, object], tricks: frozenset[str]) -> None:
        self._kept = _read_sizes(piece.graph)
        self._fewer = len(self._kept) < len(piece.inputs)
        self._piece, self._patches, self._tricks, self._run = piece, patches, tricks, None
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
            mark_dynamic(arguments[self._rows], arguments[self._rows].dim() - 1)
        return self._run(*arguments)

    def _compile(self) -> Runnable:
        started = time.perf_counter()
        log.info("compiling %s, which is needed for the first time", self._piece.name)
        if not self._guarded and self._rows is None:
            run = compile_piece(self._piece, self._patches, self._tricks)
        else:  # in a module of its own: Dynamo skips code that was generated while it compiled
            module = GraphModule(self._piece.graph, self._piece.graph.graph)
            run = torch.compile(module.forward, fullgraph=True, options=PATCHES | dict(self._patches))
        log.info("compiled %s in %.1f s", self._piece.name, time.perf_counter() - started)
        return run


def _marked(tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """The same memory with dynamic sizes: on the caller's own tensor, such as one of its cache, guards see the mark."""
    alias = tensor.detach()
    copy_marks(tensor, alias)
    maybe_mark_dynamic(alias, sizes)
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

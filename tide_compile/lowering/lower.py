"""Lowering: every distinct piece of a program is compiled once, by Inductor."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace

import torch

from tide_compile.lowering.compile_piece import Runnable, compile_piece
from tide_compile.lowering.hooks import compiling_together, note_code_files
from tide_compile.lowering.lazy_piece import LazyPiece
from tide_compile.lowering.measure_forms import begin_measuring, fastest_forms, known_forms
from tide_compile.passes.aten.gemm_forms import FEW_ROWS, Form, Linears, find_linears
from tide_compile.passes.aten.lower_attention import LowerAttention
from tide_compile.passes.aten.lower_linears import LowerLinears
from tide_compile.passes.graph.fx_tools import value_of
from tide_compile.passes.graph.structure_key import structure_key
from tide_compile.passes.plan import Piece, Program

log = logging.getLogger("tide_compile")


def lower(
    program: Program,
    lowering: str,
    mode: str | None = None,
    compiled_to: Callable[[str, list[str]], None] | None = None,
    pack_weights: bool = False,
) -> dict[str, Runnable]:
    """Compile a program's pieces.

    Layers repeat, so most pieces have twins: graphs that are equal but for names. Weights and caches are inputs, so
    one compiled piece serves all its twins. Pieces that only run once a token has left are compiled when they are
    first run. Products of few rows that were never measured on this machine are taken for streamed, measured while
    there is nothing else to do, and compiled again where that was wrong.

    Args:
        program: what ``passes.run`` returned. Its graphs are consumed.
        lowering: ``"inductor"``, or ``"eager"`` to interpret the graphs.
        mode: Inductor's mode (``"reduce-overhead"``, ``"max-autotune"``), or None.
        compiled_to: is told the name of each distinct piece and the files of its code, when it has been compiled.
        pack_weights: whether products may read copies of their weights.

    Returns:
        The callable of each piece, by name.
    """
    if lowering == "eager":
        return {name: piece.graph for name, piece in program.pieces.items()}
    pieces = program.pieces
    found = {name: find_linears(piece.graph.graph) for name, piece in pieces.items()}
    products = set().union(*found.values())
    forms = known_forms(products, pack_weights)
    assumed = products - forms.keys()
    if any(linears.rows > FEW_ROWS for linears in assumed):
        forms, assumed = fastest_forms(products, pack_weights), set()
    copies = {n: replace(p, graph=copy.deepcopy(p.graph)) for n, p in pieces.items() if found[n] & assumed}
    compiling = _Compiling(pieces, found, mode, compiled_to)
    started = time.perf_counter()
    with nullcontext() if _uses_gpu(program) else compiling_together():
        compiling.compile(pieces, forms | dict.fromkeys(assumed, "stream"))
        begin_measuring(assumed)
    if assumed:
        forms = fastest_forms(products, pack_weights)
        wrong = {linears for linears in assumed if forms[linears] != "stream"}
        compiling.compile({name: piece for name, piece in copies.items() if found[name] & wrong}, forms)
    seconds = time.perf_counter() - started
    log.info("compiled %d distinct of %d pieces in %.1f s", len(compiling.done), len(pieces), seconds)
    return {name: compiling.done[key] for name, key in compiling.keys.items()}


class _Compiling:
    """Pieces compiled once for each ``structure_key``: ``done`` by key, ``keys`` by name."""

    def __init__(
        self,
        pieces: Mapping[str, Piece],
        found: Mapping[str, set[Linears]],
        mode: str | None,
        compiled_to: Callable[[str, list[str]], None] | None,
    ) -> None:
        self.keys = {name: structure_key(piece.graph) for name, piece in pieces.items()}  # compiling changes graphs
        self.done: dict[str, Runnable] = {}
        self._found, self._compiled_to = found, compiled_to
        self._patches = torch._inductor.list_mode_options(mode) if mode else {}

    def compile(self, pieces: Mapping[str, Piece], forms: Mapping[Linears, Form]) -> None:
        """Compile these, in the place of what may be there: compilers have most to do first."""
        done: dict[str, Runnable] = {}
        for name, piece in sorted(pieces.items(), key=_size, reverse=True):
            key = self.keys[name]
            if key not in done:
                patches = self._patches_of(name, forms)
                with note_code_files() as files:
                    done[key] = LazyPiece(piece, patches) if _is_later(name) else compile_piece(piece, patches)
                if self._compiled_to is not None:
                    done[key] = _telling(name, done[key], files, self._compiled_to)
        self.done |= done

    def _patches_of(self, name: str, forms: Mapping[Linears, Form]) -> dict[str, object]:
        patches = dict(self._patches)
        if name.endswith(".compact"):
            patches.pop("triton.cudagraphs", None)  # a CUDA graph for each number of rows is no use
        chosen = {linears: forms[linears] for linears in self._found[name]}
        return patches | {"post_grad_custom_pre_pass": [LowerLinears(chosen), LowerAttention()]}


def _telling(name: str, run: Runnable, files: list[str], compiled_to: Callable[[str, list[str]], None]) -> Runnable:
    """``run``, which tells its files: now, or where nothing is compiled yet, after its first run."""
    if not isinstance(run, LazyPiece):
        compiled_to(name, files)
        return run
    told = False

    def first(*arguments: object) -> tuple:
        nonlocal told
        if told:
            return run(*arguments)
        with note_code_files() as files:
            result = run(*arguments)
        told = True
        compiled_to(name, files)
        return result

    return first


def _size(named: tuple[str, Piece]) -> int:
    return len(named[1].graph.graph.nodes)


def _uses_gpu(program: Program) -> bool:
    """Triton's kernels have to be there when a graph is put into Inductor's cache, or they are not in it."""
    values = [value_of(n) for p in program.pieces.values() for n in p.graph.graph.find_nodes(op="placeholder")]
    return any(isinstance(v, torch.Tensor) and v.device.type != "cpu" for v in values)


def _is_later(name: str) -> bool:
    """Whether a piece runs only when a token has left."""
    return name.startswith(("fill_", "project_")) or name.endswith((".masked", ".compact"))

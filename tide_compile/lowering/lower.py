"""lower: every distinct piece of a program is compiled once, by Inductor."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace

import torch

from tide_compile.config import TIDEConfig
from tide_compile.kernels.few_rows import FEW_ROWS
from tide_compile.lowering.code_cache import check_code_cache
from tide_compile.lowering.compile_piece import Runnable, compile_piece
from tide_compile.lowering.hooks import compiling_together, note_code_files
from tide_compile.lowering.lazy_piece import LazyPiece
from tide_compile.lowering.measure_forms import begin_measuring, fastest_forms, known_forms
from tide_compile.lowering.self_test import buffers_can_be_reused
from tide_compile.passes.aten.gemm_forms import Form, Linears, find_linears
from tide_compile.passes.aten.lower_attention import LowerAttention
from tide_compile.passes.aten.lower_linears import LowerLinears
from tide_compile.passes.graph.fx_tools import value_of
from tide_compile.passes.graph.structure_key import structure_key
from tide_compile.passes.program import ROWS, Piece, Program
from tide_compile.torch_internals.inductor import code_cache, mode_options

log = logging.getLogger("tide_compile")

CompiledTo = Callable[[str, list[str]], None]


def lower(
    program: Program, config: TIDEConfig, mode: str | None = None, compiled_to: CompiledTo | None = None
) -> dict[Piece, Runnable]:
    """Compile a program's pieces.

    Layers repeat, so most pieces have twins: graphs that are equal but for names. Weights and caches are inputs, so
    one compiled piece serves all its twins. Pieces that are needed only once a token has left are compiled when they
    are first run. Products of few rows that were never measured on this machine are taken for streamed, measured while
    there is nothing else to do, and compiled again where that was wrong.

    Args:
        program: what ``passes.run`` returned. Its graphs are consumed.
        config: ``lowering`` (``"eager"`` interprets the graphs), ``pack_weights``, ``disable``.
        mode: Inductor's mode (``"reduce-overhead"``, ``"max-autotune"``), or None.
        compiled_to: is told the name of each distinct piece and the files of its code, when it has been compiled.

    Returns:
        The callable of each piece.

    Raises:
        OutputFileError: Inductor cannot keep its code.
    """
    if config.lowering == "eager":
        return {piece: piece.graph for piece in program.pieces()}
    pieces, tricks = list(program.pieces()), config.tricks
    check_code_cache(code_cache(), not _uses_gpu(pieces))
    if "buffer_reuse" in tricks and not buffers_can_be_reused():  # asked while nothing else is being compiled
        tricks -= {"buffer_reuse"}
    lowers = "lower_linears" in tricks
    found = {piece: find_linears(piece.graph.graph) if lowers else set() for piece in pieces}
    products = set().union(*found.values())
    kinds = config.pack_weights, "gemm_template" in tricks
    forms = known_forms(products, *kinds)
    assumed = products - forms.keys()
    if any(linears.rows > FEW_ROWS for linears in assumed):
        forms, assumed = fastest_forms(products, *kinds), set()
    copies = {piece: replace(piece, graph=copy.deepcopy(piece.graph)) for piece in pieces if found[piece] & assumed}
    compiling = _Compiling(pieces, found, mode, tricks, compiled_to)
    started = time.perf_counter()
    together = "compile_together" in tricks and not _uses_gpu(pieces)
    with compiling_together() if together else nullcontext():
        compiling.compile({piece: piece for piece in pieces}, forms | dict.fromkeys(assumed, "stream"))
        begin_measuring(assumed)
    if assumed:
        forms = fastest_forms(products, *kinds)
        wrong = {linears for linears in assumed if forms[linears] != "stream"}
        compiling.compile({piece: unused for piece, unused in copies.items() if found[piece] & wrong}, forms)
    seconds = time.perf_counter() - started
    log.info("compiled %d distinct of %d pieces in %.1f s", len(compiling.done), len(pieces), seconds)
    return {piece: compiling.done[key] for piece, key in compiling.keys.items()}


class _Compiling:
    """Pieces compiled once for each ``structure_key``: ``done`` by key, ``keys`` by piece."""

    def __init__(
        self,
        pieces: Iterable[Piece],
        found: Mapping[Piece, set[Linears]],
        mode: str | None,
        tricks: frozenset[str],
        compiled_to: CompiledTo | None,
    ) -> None:
        self.keys = {piece: structure_key(piece.graph) for piece in pieces}  # compiling changes graphs
        self.done: dict[str, Runnable] = {}
        self._found, self._tricks, self._compiled_to = found, tricks, compiled_to
        self._patches = mode_options(mode)

    def compile(self, graphs: Mapping[Piece, Piece], forms: Mapping[Linears, Form]) -> None:
        """Compile pieces from these graphs, in the place of what may be there: compilers have most to do first."""
        done: dict[str, Runnable] = {}
        for piece in sorted(graphs, key=lambda piece: len(graphs[piece].graph.graph.nodes), reverse=True):
            key = self.keys[piece]
            if key not in done:
                arguments = (graphs[piece], self._patches_of(piece, forms), self._tricks)
                with note_code_files() as files:
                    done[key] = (compile_piece if piece.needed == "at once" else LazyPiece)(*arguments)
                if self._compiled_to is not None:
                    done[key] = _telling(piece.name, done[key], files, self._compiled_to)
        self.done |= done

    def _patches_of(self, piece: Piece, forms: Mapping[Linears, Form]) -> dict[str, object]:
        patches = dict(self._patches)
        if ROWS in piece.inputs:
            patches.pop("triton.cudagraphs", None)  # a CUDA graph for each number of rows is no use
        chosen = {linears: forms[linears] for linears in self._found[piece]}
        passes = [LowerLinears(chosen)] if "lower_linears" in self._tricks else []
        passes += [LowerAttention()] if "lower_attention" in self._tricks else []
        return patches | {"post_grad_custom_pre_pass": passes} if passes else patches


def _telling(name: str, run: Runnable, files: list[str], compiled_to: CompiledTo) -> Runnable:
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


def _uses_gpu(pieces: Iterable[Piece]) -> bool:
    """Triton's kernels have to be there when a graph is put into Inductor's cache, or they are not in it."""
    values = (value_of(n) for piece in pieces for n in piece.graph.graph.find_nodes(op="placeholder"))
    return any(isinstance(v, torch.Tensor) and v.device.type != "cpu" for v in values)

"""Lowering: every distinct piece of a program is compiled once, by Inductor."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from tide_compile.compiled import Lazy, Runnable, compile_piece
from tide_compile.inductor_code import compiling_together, note_code_files
from tide_compile.passes.fx_tools import structure_key, value_of
from tide_compile.passes.lower_attention import LowerAttention
from tide_compile.passes.lower_linears import Form, Linears, LowerLinears, find_linears
from tide_compile.passes.plan import Piece, Program
from tide_compile.tuning import fastest_forms

log = logging.getLogger("tide_compile")


def lower(
    program: Program,
    lowering: str,
    mode: str | None = None,
    compiled_to: Callable[[str, list[str]], None] | None = None,
) -> dict[str, Runnable]:
    """Compile a program's pieces.

    Layers repeat, so most pieces have twins: graphs that are equal but for names. Weights and caches are inputs, so
    one compiled piece serves all its twins. Pieces that only run once a token has left are compiled when they are
    first run.

    Args:
        program: what ``passes.run`` returned. Its graphs are consumed.
        lowering: ``"inductor"``, or ``"eager"`` to interpret the graphs.
        mode: Inductor's mode (``"reduce-overhead"``, ``"max-autotune"``), or None.
        compiled_to: is told the name of each distinct piece and the files of its code, when it has been compiled.

    Returns:
        The callable of each piece, by name.
    """
    if lowering == "eager":
        return {name: piece.graph for name, piece in program.pieces.items()}
    patches = torch._inductor.list_mode_options(mode) if mode else {}
    plain = {n: v for n, v in patches.items() if n != "triton.cudagraphs"}  # a CUDA graph per number of rows is no use
    forms = fastest_forms(set().union(*(find_linears(p.graph.graph) for p in program.pieces.values())))
    compiled: dict[str, Runnable] = {}
    runnables = {}
    started = time.perf_counter()
    keys = {name: structure_key(piece.graph) for name, piece in program.pieces.items()}  # compiling changes graphs
    with nullcontext() if _uses_gpu(program) else compiling_together():
        for name, piece in sorted(program.pieces.items(), key=_size, reverse=True):  # compilers have most to do first
            key = keys[name]
            if key not in compiled:
                patch = (plain if name.endswith(".compact") else patches) | _linears(piece, forms)
                with note_code_files() as files:
                    compiled[key] = Lazy(piece, patch) if _is_later(name) else compile_piece(piece, patch)
                if compiled_to is not None:
                    compiled[key] = _telling(name, compiled[key], files, compiled_to)
            runnables[name] = compiled[key]
    log.info(
        "compiled %d distinct of %d pieces in %.1f s",
        len(compiled),
        len(runnables),
        time.perf_counter() - started,
    )
    return runnables


def _telling(name: str, run: Runnable, files: list[str], compiled_to: Callable[[str, list[str]], None]) -> Runnable:
    """``run``, which tells its files: now, or where nothing is compiled yet, after its first run."""
    if not isinstance(run, Lazy):
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


def _linears(piece: Piece, forms: dict[Linears, Form]) -> dict[str, object]:
    chosen = {linears: forms[linears] for linears in find_linears(piece.graph.graph) & forms.keys()}
    return {"post_grad_custom_pre_pass": [LowerLinears(chosen), LowerAttention()]}

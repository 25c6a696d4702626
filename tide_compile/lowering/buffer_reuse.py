"""buffer_reuse: the small temporaries of compiled code are allocated once, and not anew in each call.

Inductor's code for a CPU makes a tensor of every intermediate result and of every part of one that a loop writes: some
50 per layer, in Python, on one core, while the memory waits.
"""

from __future__ import annotations

import ast
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch

_LARGEST = 1 << 16  # bytes: what is larger has more to do than to be allocated


class _Kept(threading.local):
    """Tensors of one thread: others may run the same code at the same time."""

    def __init__(self, make: Callable[[], tuple[torch.Tensor, ...]]) -> None:
        with torch.inference_mode(False):  # else nothing outside of it could write into them
            self.buffers = make()


def reuse_buffers(module: ModuleType) -> ModuleType:
    """The module of code that Inductor has generated, with a ``call`` that keeps its temporaries for the next call.

    Kept are tensors of constant sizes of up to 64 KB that neither leave the function nor are part of anything that may.
    The module itself, which belongs to Inductor's cache, stays as it is; so it is returned if there is nothing to keep.
    """
    tree = ast.parse(Path(module.__file__).read_text())
    call = next((n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "call"), None)
    kept = _temporaries(call) if call else []
    if not kept:
        return module
    names = ast.Tuple([ast.Name(statement.targets[0].id, ast.Store()) for statement in kept], ast.Store())
    build = ast.parse("def make():\n    pass\ndef build(self, kept):\n    pass")
    make, outer = build.body
    loaded = ast.Tuple([ast.Name(name.id, ast.Load()) for name in names.elts], ast.Load())
    make.body = [*kept, ast.Return(loaded)]
    unpack = ast.Assign([names], ast.parse("kept.buffers", mode="eval").body)
    call.args.args = call.args.args[-1:]  # without self
    call.body = [unpack, *(statement for statement in call.body if statement not in kept)]
    outer.body = [call, ast.Return(ast.Name("call", ast.Load()))]
    found: dict[str, Callable] = {}
    exec(compile(ast.fix_missing_locations(build), module.__file__, "exec"), module.__dict__, found)
    copy = ModuleType(module.__name__)
    copy.__dict__.update(module.__dict__, call=found["build"](getattr(module, "runner", None), _Kept(found["make"])))
    return copy


def _temporaries(call: ast.FunctionDef) -> list[ast.Assign]:
    """The statements that allocate what can be kept, and those that give it another name or view, in order."""
    made: dict[str, ast.Assign] = {}
    memory: dict[str, str] = {}  # of which allocation a name is, or is a view
    leaving: set[str] = set()
    for statement in call.body:
        match statement:
            case ast.Assign(
                [ast.Name(name)], ast.Call(ast.Name("empty_strided_cpu"), [size, stride, ast.Attribute(attr=dtype)])
            ) if name not in memory:
                memory[name] = name
                if _bytes(size, stride, getattr(torch, dtype)) <= _LARGEST:
                    made[name] = statement
                else:
                    leaving.add(name)
            case ast.Assign([ast.Name(name)], ast.Call(ast.Name("reinterpret_tensor"), [ast.Name(of), *sizes])) if (
                name not in memory and of in memory and all(map(_is_constant, sizes))
            ):
                memory[name], made[name] = memory[of], statement
            case ast.Assign([ast.Name(name)], ast.Name(of)) if name not in memory and of in memory:
                memory[name], made[name] = memory[of], statement
            case ast.Expr() | ast.Delete():  # kernels, which return nothing
                pass
            case _:
                leaving |= {memory[name] for name in _names(statement) if name in memory}
    return [statement for name, statement in made.items() if memory[name] not in leaving]


def _bytes(size: ast.expr, stride: ast.expr, dtype: torch.dtype) -> float:
    if not (_is_constant(size) and _is_constant(stride)):
        return math.inf
    steps = zip(ast.literal_eval(size), ast.literal_eval(stride), strict=True)
    return (1 + sum((length - 1) * step for length, step in steps)) * dtype.itemsize


def _is_constant(value: ast.expr) -> bool:
    return all(isinstance(n, ast.Constant | ast.Tuple | ast.Load) for n in ast.walk(value))


def _names(statement: ast.stmt) -> Iterator[str]:
    return (n.id for n in ast.walk(statement) if isinstance(n, ast.Name))

"""structure_key: which graphs one compiled artefact can serve."""

from __future__ import annotations

import hashlib
import operator

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from tide_compile.passes.graph.fx_tools import value_of
from tide_compile.torch_internals.fx import OpOverload


def structure_key(gm: GraphModule) -> str:
    """A digest that two graphs share exactly when one compiled artefact can serve both.

    Covers operators, wiring, constants, and the shape, stride, dtype and device of every placeholder, with symbols
    renamed in the order in which they appear (their hints count). Node names and metadata do not count.
    """
    symbols: dict[str, str] = {}
    numbers: dict[Node, int] = {}

    def symbolic(expr: object) -> str:
        text = str(expr)
        for symbol in (
            sorted(
                map(str, getattr(getattr(expr, "node", None), "expr", expr).free_symbols),
                key=len,
                reverse=True,
            )
            if isinstance(expr, torch.SymInt)
            else ()
        ):
            text = text.replace(symbol, symbols.setdefault(symbol, f"<{len(symbols)}>"))
        return f"{text}={expr.node.hint}" if isinstance(expr, torch.SymInt) else text

    def describe(value: object) -> str:
        if isinstance(value, torch.Tensor):
            dims = [",".join(map(symbolic, s)) for s in (value.shape, value.stride())]
            return f"{type(value).__name__}{value.dtype}{value.device}{dims}"
        return symbolic(value) if isinstance(value, torch.SymInt) else type(value).__name__

    lines = []
    for number, node in enumerate(gm.graph.nodes):
        numbers[node] = number
        args = map_arg((node.args, dict(node.kwargs)), lambda n: _Reference(numbers[n]))
        if node.op == "placeholder":
            lines.append(f"{number} in {describe(value_of(node))}")
        elif node.op == "get_attr":
            constant = operator.attrgetter(node.target)(gm)
            lines.append(f"{number} constant {id(constant)}")
        else:
            lines.append(f"{number} {node.op} {_target_name(node.target)} {args!r}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Reference(int):
    def __repr__(self) -> str:
        return f"%{int(self)}"


def _target_name(target: object) -> str:
    if isinstance(target, str | OpOverload):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', repr(target))}"

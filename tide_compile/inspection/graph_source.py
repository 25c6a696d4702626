"""graph_source: graphs as Python that can be read, imported and run; torch writes the statements."""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Iterator

import torch
from torch.fx import GraphModule
from torch.package import sys_importer
from torch.package.importer import ObjMismatchError, ObjNotFoundError

from tide_compile.passes.graph.fx_tools import hint, value_of
from tide_compile.passes.program import Piece, Program
from tide_compile.torch_internals.fx import import_statement

_MOST_WRITTEN = 64  # elements of a constant; of larger ones the file holds zeros
_HEADER = "import torch\nimport tide_compile.backend  # defines torch.ops.tide\n"
_FOOTER = '''
PIECES = {pieces}


def example_inputs(piece):
    """Tensors of zeros, and numbers, as the piece takes them."""
    made = []
    for value in PIECES[piece].takes:
        if isinstance(value, int):
            made.append(value)
        else:
            shape, dtype, device = value
            made.append(torch.zeros(shape, dtype=dtype, device=device))
    return made


if __name__ == "__main__":
    for piece in PIECES:
        with torch.no_grad():
            results = PIECES[piece]()(*example_inputs(piece))
        print(piece, [tuple(r.shape) if isinstance(r, torch.Tensor) else r for r in results])
'''


def source_of(program: GraphModule | Program, about: str) -> str:
    """A Python file with one ``torch.nn.Module`` per piece, every value annotated with dtype and shape.

    A piece takes and returns the values that its ``inputs`` and ``outputs`` name. ``PIECES`` maps the pieces' names to
    their classes, ``example_inputs(name)`` makes arguments of the right shapes, and running the file runs all pieces.
    Constants of more than 64 elements are zeros there. ``about`` becomes the file's docstring.
    """
    classes, imports = [], {}
    for piece in _pieces_of(program):
        imports |= dict.fromkeys(_imports(piece.graph))
        classes.append(_class_of(piece))
    names = ", ".join(f'"{piece.name}": {_class_name(piece.name)}' for piece in _pieces_of(program))
    text = about.replace("\\", "\\\\").replace('"""', "'''")
    parts = [f'"""{text}\n"""\n', "\n".join((_HEADER, *imports)), *classes, _FOOTER.replace("{pieces}", f"{{{names}}}")]
    return re.sub(r"[ \t]+\n", "\n", "\n\n".join(parts))


def _pieces_of(program: GraphModule | Program) -> Iterator[Piece]:
    if isinstance(program, Program):
        yield from program.pieces()
        return
    inputs = tuple(n.name for n in program.graph.find_nodes(op="placeholder"))
    yield Piece("model", program, inputs, tuple(map(str, program.graph.output_node().args[0])))


def _class_name(piece: str) -> str:
    return "".join(part.title() for part in re.split(r"\W|_", piece))


def _class_of(piece: Piece) -> str:
    takes = [_spec(value_of(n)) for n in piece.graph.graph.find_nodes(op="placeholder")]
    lines = [
        f"class {_class_name(piece.name)}(torch.nn.Module):",
        f"    inputs = {piece.inputs!r}",
        f"    outputs = {piece.outputs!r}",
        f"    takes = [{', '.join(takes)}]",
    ]
    return "\n".join((*lines, *_body(piece.graph)))


def _body(gm: GraphModule) -> Iterator[str]:
    """Of a class: graphs inside this one (of ``vmap`` and its like), constants, forward."""
    values = {
        n.target: operator.attrgetter(n.target)(gm) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")
    }
    made = []
    for target, value in values.items():
        *parents, _ = target.split(".")
        made += [f"self.{'.'.join(parents[: i + 1])} = torch.nn.Module()" for i in range(len(parents))]
        if isinstance(value, GraphModule):
            inner = f"Inner{_class_name(target)}"
            yield from ("", f"    class {inner}(torch.nn.Module):", *(f"    {line}" for line in _body(value)))
            made.append(f"self.{target} = self.{inner}()")
        elif isinstance(value, torch.Tensor):
            made.append(f"self.{target} = {_constant(value)}")
        else:
            made.append(f"self.{target} = None  # {type(value).__name__}, which has no form as text")
    if made:
        yield from ("", "    def __init__(self):", "        super().__init__()")
        yield from (f"        {line}" for line in dict.fromkeys(made))
    code = gm.graph.python_code("self", verbose=True).src.strip("\n")
    yield from ("", *(f"    {line}" for line in code.splitlines()))


def _spec(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"({tuple(map(_number, value.shape))}, {value.dtype}, {str(value.device)!r})"
    return str(_number(value))


def _number(size: object) -> int:
    number = hint(size)
    return number if isinstance(number, int) else 2


def _constant(value: torch.Tensor) -> str:
    where = f"dtype={value.dtype}, device={str(value.device)!r}"
    if value.numel() > _MOST_WRITTEN or type(value) not in (torch.Tensor, torch.nn.Parameter):
        return f"torch.zeros({tuple(map(_number, value.shape))}, {where})"
    return f"torch.tensor({value.tolist()}, {where})"


def _imports(gm: GraphModule) -> Iterator[str]:
    """Of what the code of a graph and of those inside it names."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            for name, value in module.graph.python_code("self").globals.items():
                try:
                    yield import_statement(name, value, sys_importer)
                except (ObjNotFoundError, ObjMismatchError):
                    yield f"{name} = None  # {value!r} has no name that can be imported"
            calls = (n.target for n in module.graph.nodes if n.op == "call_function")
            homes = {getattr(target, "__module__", None) or "" for target in calls}
            yield from (f"import {home}" for home in sorted(homes) if home.startswith("torch.") and home in sys.modules)

"""verify: what must hold between any two passes."""

from __future__ import annotations

from torch.fx import GraphModule

from tide_compile.passes.errors import VerificationError
from tide_compile.passes.graph.fx_tools import output_nodes, value_of
from tide_compile.passes.program import OUT, ROWS, VALID, Program


def verify(program: GraphModule | Program, after: str) -> None:
    """Check that every graph is well formed and that every name a piece reads has been defined before it.

    Raises:
        VerificationError: names the pass, the piece and what is wrong.
    """
    if isinstance(program, GraphModule):
        program.graph.lint()
        return
    defined = {*program.arguments, *program.constants, OUT, ROWS, VALID}
    straight = list(program.straight())
    for piece in (*straight, *(piece for piece in program.pieces() if piece not in straight)):
        name = piece.name
        piece.graph.graph.lint()
        placeholders = piece.graph.graph.find_nodes(op="placeholder")
        outputs = output_nodes(piece.graph.graph)
        _require(len(placeholders) == len(piece.inputs), after, name, "has other placeholders than inputs")
        _require(len(outputs) == len(piece.outputs), after, name, "returns other values than it names")
        missing = sorted(set(piece.inputs) - defined)
        _require(not missing, after, name, f"reads {missing}, which no earlier piece defines")
        unknown = [n.name for n in placeholders if value_of(n) is None]
        _require(not unknown, after, name, f"has placeholders without a fake value: {unknown}")
        defined |= set(piece.outputs)
    names = [piece.name for piece in program.pieces()]
    twice = sorted({name for name in names if names.count(name) > 1})
    _require(not twice, after, "program", f"has several pieces of one name: {twice}")
    lost = [r for r in program.results if isinstance(r, str) and r not in defined]
    _require(not lost, after, "program", f"does not compute {lost}, which the model returns")


def _require(condition: bool, after: str, piece: str, complaint: str) -> None:
    if not condition:
        raise VerificationError(
            f"after pass {after}: {piece} {complaint}. This is a bug in tide_compile; please report it."
        )

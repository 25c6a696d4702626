"""The loop over the passes: verified after each, and observed."""

import pytest

from tests.support.graphs import decode_graph, passes, settings
from tide_compile.errors import VerificationError
from tide_compile.passes.plan import Piece, Program
from tide_compile.passes.verify import verify


def test_verifier():
    program, _ = passes(decode_graph(1), settings())
    pieces = dict(program.pieces)
    piece = pieces["segment_1"]
    pieces["segment_1"] = Piece(piece.graph, ("nowhere", *piece.inputs[1:]), piece.outputs)
    with pytest.raises(VerificationError, match="after pass some_pass: segment_1 reads \\['nowhere'\\]"):
        verify(Program(pieces, program.arguments, program.results), "some_pass")


def test_observer_sees_every_pass():
    events = []
    passes(decode_graph(1), settings([0]), events.append)
    names = [e.name for e in events]
    assert names[0] == "find_layers" and names[-1] == "compact_rows"
    split = next(e for e in events if e.name == "split_segments")
    assert split.nodes_after > split.nodes_before > 0

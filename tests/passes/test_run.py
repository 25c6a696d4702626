"""The loop over the passes: verified after each, and observed."""

from dataclasses import replace

import pytest

from tests.support.graphs import decode_graph, passes, settings
from tide_compile.errors import VerificationError
from tide_compile.passes.verify import verify


def test_verifier():
    program, _ = passes(decode_graph(1), settings())
    first, second, *others = program.segments
    piece = replace(second.plain, inputs=("nowhere", *second.plain.inputs[1:]))
    broken = replace(program, segments=(first, replace(second, plain=piece), *others))
    with pytest.raises(VerificationError, match=rf"after pass some_pass: {piece.name} reads \['nowhere'\]"):
        verify(broken, "some_pass")


def test_observer_sees_every_pass():
    events = []
    passes(decode_graph(1), settings([0]), events.append)
    names = [e.name for e in events]
    assert names[0] == "find_layers" and names[-1] == "compact_rows"
    split = next(e for e in events if e.name == "split_segments")
    assert split.nodes_after > split.nodes_before > 0

"""Rows are kept apart only where there are several."""

from tests.support.graphs import decode_graph, passes, settings


def test_single_row_needs_no_mask():
    program, _ = passes(decode_graph(1), settings([1], checkpoint_interval=2, min_layers=1))
    assert not any(segment.masked for segment in program.segments)

"""Routers are asked where their checkpoints are, and nowhere else."""

import torch

from tests.support.graphs import count, decode_graph, passes, settings
from tests.support.models import HIDDEN
from tide_compile.passes.program import ACTIVE, LEAVE


def test_router_and_mask_are_spliced_where_they_belong():
    program, plan = passes(decode_graph(2), settings([1], checkpoint_interval=2, min_layers=1))
    assert plan.checkpoints == (1,)
    first, second = program.segments
    router, rest = first.plain, second.plain
    assert count(router, torch.ops.tide.route.default) == 1 and LEAVE in router.outputs
    assert count(rest, torch.ops.tide.route.default) == 0 and ACTIVE not in rest.inputs
    assert first.masked is None and first.checkpoint == 1 and second.checkpoint is None
    masked = second.masked
    assert count(masked, torch.where) == count(rest, torch.where) + 2  # one per layer
    assert ACTIVE in masked.inputs


def test_rows_that_leave_go_through_a_piece():
    """Behind every checkpoint, also where nothing was learned: then the row itself. Catches a row that gets what
    another one left with."""
    program, _ = passes(decode_graph(2), settings([1], checkpoint_interval=2, min_layers=1))
    project = program.segments[0].project
    assert project.needed == "after an exit" and program.segments[1].project is None
    states, out = torch.randn(2, 1, HIDDEN), torch.zeros(2, 1, HIDDEN)
    (found,) = project.graph(states, torch.tensor([[True], [False]]), out)
    assert torch.equal(found[0], states[0]) and torch.equal(found[1], out[1])

"""Routers are asked where their checkpoints are, and nowhere else."""

import torch

from tests.support.graphs import count, decode_graph, passes, settings
from tide_compile.passes.plan import ACTIVE, LEAVE


def test_router_and_mask_are_spliced_where_they_belong():
    program, plan = passes(decode_graph(2), settings([1], checkpoint_interval=2, min_layers=1))
    assert plan.checkpoints == (1,)
    router, rest = program.pieces["segment_0"], program.pieces["segment_1"]
    assert count(router, torch.ops.tide.route.default) == 1 and LEAVE in router.outputs
    assert count(rest, torch.ops.tide.route.default) == 0 and ACTIVE not in rest.inputs
    assert "segment_0.masked" not in program.pieces
    masked = program.pieces["segment_1.masked"]
    assert count(masked, torch.where) == count(rest, torch.where) + 2  # one per layer
    assert ACTIVE in masked.inputs

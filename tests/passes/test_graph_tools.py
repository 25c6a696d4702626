"""Equal structure and liveness, as several passes ask for them."""

import operator

import torch

from tests.support.graphs import decode_graph, passes, settings
from tests.support.models import LAYERS
from tide_compile.passes.graph.fx_tools import live_nodes, mutated_arguments
from tide_compile.passes.graph.structure_key import structure_key


def test_twins_share_a_key_and_look_alikes_do_not():
    program, _ = passes(decode_graph(1), settings())
    keys = [structure_key(segment.plain.graph) for segment in program.segments]
    assert len(keys) == LAYERS and len(set(keys)) == 1
    sliding, _ = passes(decode_graph(1, "sliding-window"), settings())
    keys = [structure_key(segment.plain.graph) for segment in sliding.segments]
    assert keys[0] == keys[2] and keys[0] != keys[1]
    gm = program.segments[0].plain.graph
    scale = next(n for n in gm.graph.nodes if n.target is operator.add and isinstance(n.args[1], float))
    scale.args = (scale.args[0], 2 * scale.args[1])  # another eps
    assert structure_key(gm) != structure_key(program.segments[1].plain.graph)


def test_liveness_follows_memory():
    """A write into a buffer that nothing reads is dead; into a view of an argument it is not."""

    def f(x, cache):
        scratch = torch.zeros(4)
        scratch.add_(x)
        cache[:2].copy_(x[:2])
        kept = torch.zeros(4)
        kept.index_add_(0, torch.tensor([0, 1, 2, 3]), x)
        return kept

    graphs = []
    torch.compile(f, backend=lambda gm, _: graphs.append(gm) or gm.forward)(torch.ones(4), torch.zeros(4))
    live = live_nodes(graphs[0].graph)
    writes = {n.target: n in live for n in graphs[0].graph.nodes if mutated_arguments(n)}
    assert writes == {"add_": False, "copy_": True, "index_add_": True}

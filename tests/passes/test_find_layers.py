"""Layers are found by name and by structure, and a graph without them is refused."""

import pytest
import torch
from torch import nn

from tests.families.configs import build
from tests.support.compare import check
from tests.support.graphs import Broken, Stack, capture, decode_graph, passes, settings
from tests.support.models import CONFIGS, HIDDEN, LAYERS, prompt, tiny
from tide_compile import RouterBank
from tide_compile.errors import LayersNotFoundError, LayersSplitError, NothingToSkipError


def test_layers_and_boundaries():
    gm = decode_graph(1)
    program, plan = passes(gm, settings())
    assert len(plan.layers) == LAYERS
    assert plan.layers.prefix.endswith("model.layers")
    assert len(set(plan.boundaries.leaving)) == LAYERS
    assert plan.single_row
    assert list(program.pieces()) == list(program.straight()) and len(program.segments) == LAYERS


def test_nested_lists_are_not_layers():
    """Experts inside a layer are numbered too; taking them for layers would cut a layer apart."""
    model = Stack(layers=3)
    for layer in model.layers:
        layer.linear = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    (gm,) = capture(model, torch.ones(2, 3, dtype=torch.long))
    _, plan = passes(gm, settings())
    assert len(plan.layers) == 3


@pytest.mark.parametrize("decode", [False, True], ids=["prompt", "decode"])
@pytest.mark.parametrize("name", [*CONFIGS, "qwen3_next", "deepseek_v3", "roberta", "falcon"])
def test_layers_by_structure(name, decode):
    """Without a word about modules in the graph: the same boundaries as with names. Catches a layer cut in two where
    layers differ (windows, experts, state-space), where norms follow, and embeddings or norms taken for layers."""
    model = tiny(name) if name in CONFIGS else build(name)
    if decode:
        gm = decode_graph(2, model=model)
    else:
        (gm,) = capture(model, prompt(2)[0], use_cache=False)
    _, named = passes(gm, settings())
    for node in gm.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    _, found = passes(gm, settings())
    assert found.layers.prefix == "repeated blocks"
    assert (found.boundaries.entering, found.boundaries.leaving) == (
        named.boundaries.entering,
        named.boundaries.leaving,
    )


def test_no_layers():
    (gm,) = capture(nn.Bilinear(4, 4, 4), torch.ones(2, 3, 4), torch.ones(2, 3, 4))
    with pytest.raises(LayersNotFoundError, match="fallback") as caught:
        passes(gm, settings())
    assert not isinstance(caught.value, NothingToSkipError)


def test_what_a_break_leaves_over():
    """Graphs of embeddings or without weights are compiled as they are, and exits stay. Any other graph without layers
    is refused: it may be a slice of a layer, and nobody would miss the exits."""
    bank = RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    chosen = {"checkpoint_interval": 1, "min_layers": 1, "lowering": "eager"}
    check(Broken(tiny("rmsnorm-rope-gqa")), bank, "none", 2, 0.0, **chosen)
    model = tiny("rmsnorm-rope-gqa")
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: (torch._dynamo.graph_break(), head(x))[1]
    with pytest.raises(LayersNotFoundError, match="graph_breaks"):
        check(model, bank, "none", 2, 0.0, **chosen)


def test_layers_in_two_graphs():
    first, second = capture(Stack("break"), torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(LayersSplitError, match="TORCH_LOGS=graph_breaks"):
        passes(first, settings())
    with pytest.raises(LayersSplitError, match="layers 2 to 3"):
        passes(second, settings())

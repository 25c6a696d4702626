"""The passes, on graphs captured from tiny models and on small hand-made decoders."""

import operator

import pytest
import torch
from torch import nn
from transformers import StaticCache

from tests.families.configs import build
from tests.support.compare import check
from tests.support.models import CONFIGS, HIDDEN, LAYERS, prompt, tiny
from tide_compile import RouterBank, TIDEConfig
from tide_compile.errors import (
    BoundaryNotUniqueError,
    CheckpointError,
    KVNotFoundError,
    LayersNotFoundError,
    LayersSplitError,
    NothingToSkipError,
    PaddingError,
    VerificationError,
)
from tide_compile.passes.graph.fx_tools import live_nodes, mutated_arguments
from tide_compile.passes.graph.structure_key import structure_key
from tide_compile.passes.place_checkpoints import checkpoint_layers, segment_cuts
from tide_compile.passes.program import ACTIVE, LEAVE, Piece, Program
from tide_compile.passes.program import HIDDEN as STATE
from tide_compile.passes.run import run
from tide_compile.passes.verify import verify
from tide_compile.routers.settings import settings_of_bank, settings_without_exits


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Stack(nn.Module):
    """A decoder without attention; ``forward`` variants break it in one way each."""

    def __init__(self, variant="plain", layers=4, width=8):
        super().__init__()
        self.variant = variant
        self.embed = nn.Embedding(16, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 16)

    def forward(self, ids):
        first = self.layers[0](self.embed(ids))
        x = self.layers[1](first)
        if self.variant == "break":
            torch._dynamo.graph_break()
        x = self.layers[2](x)
        if self.variant == "skip":
            x = x + first
        for layer in self.layers[3:]:
            x = layer(x)
        return self.head(self.norm(x))


def capture(model, *args, **kwargs):
    """The Dynamo graphs of one call."""
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(*args, **kwargs)
    return graphs


def settings(layers=(), **changes):
    config = TIDEConfig(**{"checkpoint_interval": 1, "min_layers": 1, **changes})
    if not layers:
        return settings_without_exits(config)
    bank = RouterBank.untrained(HIDDEN, LAYERS, layers=layers, bottleneck_dim=16)
    return settings_of_bank(bank, config, torch.device("cpu"), torch.float32)


def passes(gm, chosen, observer=None):
    return run(gm, lambda: chosen, observer)


def decode_graph(batch, name="rmsnorm-rope-gqa", model=None):
    """The graph of one decoded token with an initialised static cache."""
    model = model or tiny(name)
    ids, _ = prompt(batch)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    (gm,) = capture(model, ids[:, :1], past_key_values=cache)
    return gm


def count(piece, target):
    return sum(n.target == target or getattr(n.target, "__name__", "") == target for n in piece.graph.graph.nodes)


def test_layers_and_boundaries():
    gm = decode_graph(1)
    program, plan = passes(gm, settings())
    assert len(plan.layers) == LAYERS
    assert plan.layers.prefix.endswith("model.layers")
    assert len(set(plan.boundaries.leaving)) == LAYERS
    assert plan.single_row
    assert [n for n in program.pieces] == ["prologue", "segment_0", "segment_1", "segment_2", "segment_3", "epilogue"]


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


class Broken(nn.Module):
    """A model with graph breaks in front of its layers and behind its head."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, **kwargs):
        embedded = self.inner.get_input_embeddings()(input_ids)
        torch._dynamo.graph_break()
        out = self.inner(inputs_embeds=embedded, **kwargs)
        torch._dynamo.graph_break()
        out.logits = out.logits * 2
        return out


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


def test_shared_keys_and_values_are_carried():
    """Later layers read keys and values of earlier ones: computed for skipped layers too."""
    (gm,) = capture(build("gemma4_text"), prompt(2)[0], use_cache=False)
    program, _ = passes(gm, settings((0, 1)))
    assert len(program.pieces["fill_0"].outputs) >= 2


def test_mask_under_another_name():
    """Catches padding that is counted as text where a graph has a mask, but not the user's."""
    model = tiny("rmsnorm-rope-gqa")
    causal = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    (gm,) = capture(lambda ids, bias: model(ids, attention_mask=bias, use_cache=False), prompt(2)[0], causal)
    with pytest.raises(PaddingError, match="graph break"):
        passes(gm, settings())


def test_layers_in_two_graphs():
    first, second = capture(Stack("break"), torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(LayersSplitError, match="TORCH_LOGS=graph_breaks"):
        passes(first, settings())
    with pytest.raises(LayersSplitError, match="layers 2 to 3"):
        passes(second, settings())


def test_hidden_state_that_is_overwritten():
    """A layer that adds in place destroys the state that a skipped token keeps."""
    model = Stack()
    model.layers[2].forward = lambda x: x.add_(1)
    (gm,) = capture(model, torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(BoundaryNotUniqueError, match=r"layer 2 .* overwrites"):
        passes(gm, settings())


def test_boundary_that_can_be_bypassed():
    """A connection from layer 0 to layer 3 would still be read when layers 1 and 2 are skipped."""
    (gm,) = capture(Stack("skip"), torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(BoundaryNotUniqueError, match="after layer 1"):
        passes(gm, settings())


@pytest.mark.parametrize(
    ("n", "interval", "minimum", "cuts", "checkpoints"),
    [
        (32, 4, 8, range(3, 31, 4), (7, 11, 15, 19, 23, 27)),
        (30, 4, 8, range(1, 29, 2), (7, 11, 15, 19, 23, 27)),
        (31, 4, 30, range(3, 30, 4), ()),
        (6, 1, 1, range(5), (0, 1, 2, 3, 4)),
    ],
)
def test_checkpoints(n, interval, minimum, cuts, checkpoints):
    """Never after the last layer, at least min_layers deep, on the interval; cuts make equal segments."""
    found = checkpoint_layers(n, interval, minimum)
    assert found == checkpoints and segment_cuts(n, found, interval) == tuple(cuts)


def test_routers_where_no_checkpoint_is_permitted():
    bank = RouterBank.untrained(HIDDEN, 31, bottleneck_dim=16)
    config = TIDEConfig(checkpoint_interval=4, min_layers=30, exit_threshold=0.5)
    with pytest.raises(CheckpointError, match="min_layers=30"):
        settings_of_bank(bank, config, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("n", "checkpoints", "length"), [(30, (19, 21, 23), 2), (30, (9, 19), 10), (11, (7,), 8), (30, (9,), 10)]
)
def test_segments_between_chosen_checkpoints(n, checkpoints, length):
    """Checkpoints that came with the routers: as few segments as end behind all of them."""
    cuts = segment_cuts(n, checkpoints)
    assert set(checkpoints) <= set(cuts) and cuts[0] + 1 == length


def test_fill_keeps_only_keys_and_values():
    """Attention, its output projection and the MLP must be gone: they are what an exit saves."""
    program, _ = passes(decode_graph(1), settings([1], checkpoint_interval=2, min_layers=1))
    full, fill = program.pieces["segment_1"], program.pieces["fill_1"]
    assert count(full, "scaled_dot_product_attention") == 2 and count(fill, "scaled_dot_product_attention") == 0
    assert count(full, "linear") == 2 * 7 and count(fill, "linear") == 2 * 2
    assert count(full, "index_copy_") == count(fill, "index_copy_") == 2 * 2
    assert count(full, "add_") == count(fill, "add_") == 2  # cumulative_length
    assert STATE in fill.inputs and STATE not in fill.outputs


def test_one_fill_for_all_segments():
    """Catches a call per segment, and a segment before the exit that is filled again."""
    program, _ = passes(decode_graph(1), settings([0, 1], checkpoint_interval=1, min_layers=1))
    writes = {name: count(piece, "index_copy_") for name, piece in program.pieces.items() if name.startswith("fill")}
    assert writes == {"fill_0": 2 * 3, "fill_1": 2 * 2}


def test_zero_pad_fill_needs_no_weights():
    program, _ = passes(
        decode_graph(1), settings([1], checkpoint_interval=2, min_layers=1, kv_cache_strategy="zero_pad")
    )
    assert count(program.pieces["fill_1"], "index_copy_") == 4
    assert not [n for n in program.pieces["fill_1"].inputs if "norm" in n or "mlp" in n]


def test_zero_pad_without_known_attention():
    """Eager attention without a cache shows no K and V to zero: an error, not a silent 'propagate'."""
    model = tiny("rmsnorm-rope-gqa")
    model.config._attn_implementation = "eager"
    ids, _ = prompt(2)
    (gm,) = capture(model, ids, use_cache=False)
    with pytest.raises(KVNotFoundError, match="sdpa"):
        passes(gm, settings([0], kv_cache_strategy="zero_pad"))


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


def test_single_row_needs_no_mask():
    program, _ = passes(decode_graph(1), settings([1], checkpoint_interval=2, min_layers=1))
    assert not [n for n in program.pieces if n.endswith(".masked")]


def test_twins_share_a_key_and_look_alikes_do_not():
    program, _ = passes(decode_graph(1), settings())
    keys = [structure_key(program.pieces[f"segment_{i}"].graph) for i in range(LAYERS)]
    assert len(set(keys)) == 1
    sliding, _ = passes(decode_graph(1, "sliding-window"), settings())
    keys = [structure_key(sliding.pieces[f"segment_{i}"].graph) for i in range(LAYERS)]
    assert keys[0] == keys[2] and keys[0] != keys[1]
    gm = program.pieces["segment_0"].graph
    scale = next(n for n in gm.graph.nodes if n.target is operator.add and isinstance(n.args[1], float))
    scale.args = (scale.args[0], 2 * scale.args[1])  # another eps
    assert structure_key(gm) != structure_key(program.pieces["segment_1"].graph)


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

"""Graphs that Dynamo captures from tiny models, small hand-made decoders, and what the passes make of them."""

import torch
from torch import nn
from transformers import StaticCache

from tests.support.models import HIDDEN, LAYERS, prompt, tiny
from tide_compile import RouterBank, TIDEConfig
from tide_compile.passes.run import run
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

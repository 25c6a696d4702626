"""Tiny random models, one per way of building a decoder, and calls that exercise all cache kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
    StaticCache,
)

from tide_compile import RouterBank
from tide_compile.routers.networks import ProbeRouter, Projection

VOCABULARY, HIDDEN, LAYERS, FEW = 128, 64, 4, 2  # few layers, where more would only take longer
_WIDTHS = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_attention_heads": 4}
_COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "num_hidden_layers": LAYERS}

CONFIGS = {
    "rmsnorm-rope-gqa": lambda: LlamaConfig(**_WIDTHS, **_COMMON, num_key_value_heads=2),
    "layernorm-learned-positions": lambda: GPT2Config(
        n_layer=LAYERS, n_embd=HIDDEN, n_head=4, vocab_size=VOCABULARY, n_positions=256
    ),
    "parallel-residual": lambda: GPTNeoXConfig(**_WIDTHS, **_COMMON),
    "sliding-window": lambda: Gemma3TextConfig(
        **_WIDTHS, **_COMMON, num_key_value_heads=2, head_dim=16, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
    ),
}  # fmt: skip
CACHES = ("none", "dynamic", "static")
SETTINGS = {"min_layers": 1, "checkpoint_interval": 1, "lowering": "eager"}
COMPACT = {"min_layers": 1, "checkpoint_interval": 1, "compaction": "always", "compaction_threshold": 0.0}
GENERATE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
LONG = {**GENERATE, "max_new_tokens": 12, "eos_token_id": None}


def tiny(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = LAYERS) -> PreTrainedModel:
    """A random model whose hidden states change visibly from layer to layer."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def shortcuts(rank: int = 4) -> dict[int, Projection]:
    """Of all layers but the first and the last, each of another direction and no small step."""
    generator = torch.Generator().manual_seed(4)
    shapes = {"weight": (HIDDEN, rank), "bias": (HIDDEN,), "down": (rank, HIDDEN)}
    return {
        layer: Projection(**{n: torch.randn(s, generator=generator) / 4 for n, s in shapes.items()})
        for layer in range(1, LAYERS - 1)
    }


def probing(layers: int = LAYERS) -> RouterBank:
    """Routers that see how sure the model would be, and low-rank projections, all random."""
    bank = RouterBank.untrained(HIDDEN, layers, bottleneck_dim=16)
    torch.manual_seed(0)
    for layer in bank.layers:
        parts = (torch.randn(8, HIDDEN) / 4, torch.randn(40, 8), torch.randn(40))
        bank.routers[layer] = ProbeRouter(HIDDEN, *parts, 16).requires_grad_(False)
        eighth = torch.randn(HIDDEN, 8) / 8
        bank.projections[layer] = Projection(eighth, torch.randn(HIDDEN), torch.randn(8, HIDDEN) / 8)
    return bank


def prompt(batch: int, length: int = 9, padding: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [B, S]; every row but the last is padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[: batch - 1, :padding] = 0
    return ids, mask


def logits_of(
    model: PreTrainedModel, call: Callable, cache: str, batch: int, steps: int = 4, padding: int = 3
) -> list[torch.Tensor]:
    """Logits of a prompt and, with a cache, of ``steps`` decoded tokens, without those of padding: [T, V] each.

    ``cache``: one of ``CACHES``, or ``own``: what the model makes itself.
    """
    return list(_logits(model, call, cache, batch, steps, padding))


@torch.no_grad()
def _logits(
    model: PreTrainedModel, call: Callable, cache: str, batch: int, steps: int, padding: int
) -> Iterator[torch.Tensor]:
    ids, mask = prompt(batch, padding=padding)
    extra = {
        "none": lambda: {"use_cache": False},
        "own": lambda: {"use_cache": True},
        "dynamic": lambda: {"past_key_values": DynamicCache(config=model.config)},
        "static": lambda: {"past_key_values": StaticCache(config=model.config, max_cache_len=16)},
    }[cache]()
    masked = {"attention_mask": mask}
    out = call(ids, **masked, **extra)
    yield out.logits[mask.bool()]
    if cache == "own":
        extra["past_key_values"] = out.past_key_values
    for i in range(0 if cache == "none" else steps):
        if _sees_the_past(model):
            masked["attention_mask"] = torch.cat([masked["attention_mask"], torch.ones_like(mask[:, :1])], 1)
        else:
            masked = {}
        logits = call(ids[:, i : i + 1], **masked, **extra).logits
        assert logits.shape[1] == 1, f"{logits.shape[1]} rows of logits for one token"
        yield logits[:, 0]


def _sees_the_past(model: PreTrainedModel) -> bool:
    """Whether the mask covers the tokens in the cache: not so in models that have only recurrent layers."""
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ["full_attention"]
    return not set(kinds) <= {"linear_attention", "mamba", "conv"}

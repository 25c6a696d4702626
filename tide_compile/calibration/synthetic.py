"""synthetic: routers that let a chosen share of tokens leave at chosen layers, to measure what exits are worth."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tide_compile.config import TIDEConfig
from tide_compile.errors import ConfigError
from tide_compile.model.decoder import find_decoder
from tide_compile.model.norm import Norm
from tide_compile.reference import eager_reference
from tide_compile.routers.bank import RouterBank, TokenRouter


@torch.no_grad()
def synthetic_routers(
    model: nn.Module,
    input_ids: Tensor,
    exits: Mapping[int, float],
    *,
    attention_mask: Tensor | None = None,
    exit_threshold: float = 0.85,
    seed: int = 0,
) -> RouterBank:
    """synthetic: routers that let a chosen share of tokens leave, by chance but reproducibly: for measuring.

    Args:
        model: the causal language model. input_ids: [B, S], the tokens that the shares refer to.
        exits: layer -> share, 0..1, of the tokens that reach its checkpoint; exact on ``input_ids``, about right on
            others.
        attention_mask: [B, S]. exit_threshold: with which the bank is to be used, above 0.5 and below 1.
        seed: of the random directions that tell tokens apart.

    Raises:
        ConfigError: a share or the threshold is not allowed.
    """
    if not 0.5 < exit_threshold < 1:
        raise ConfigError(f"exit_threshold={exit_threshold!r} is not allowed here: give a number between 0.5 and 1.")
    wrong = {layer: share for layer, share in exits.items() if not 0 <= share <= 1}
    if wrong or not exits:
        raise ConfigError(f"exits={dict(exits)!r} is not allowed: map layers to shares from 0 to 1.")
    decoder = find_decoder(model)
    width, device = decoder.hidden_dim, decoder.device
    bank = RouterBank({}, Norm(torch.ones(width, dtype=torch.float32)), len(decoder.layers))
    config = TIDEConfig(exit_threshold=exit_threshold, min_layers=1, checkpoint_interval=1)
    generator = torch.Generator().manual_seed(seed)
    for layer in sorted(exits):
        direction = nn.functional.normalize(torch.randn(width, generator=generator, dtype=torch.float32), dim=0)
        bank.routers[layer] = _router(direction, 1.0)
        with eager_reference(model, bank, config, decoder) as reference:
            model(input_ids=input_ids.to(device), attention_mask=attention_mask, use_cache=False)
        reached = reference.exit_layers[0] >= layer
        sizes = torch.logit(reference.scores[0][layer][reached].double()).sort(descending=True).values
        bank.routers[layer] = _router(direction, _scale(sizes, exits[layer], exit_threshold))
    return bank


def _router(direction: Tensor, scale: float) -> TokenRouter:
    """Scores ``sigmoid(scale * z * tanh(z / 2))``, z the part of the normed state along ``direction`` [H]: never below
    0.5, so that a scale sets how many are above a threshold."""
    router = TokenRouter(direction.numel(), 2)
    router.down.weight.copy_(torch.stack([direction, -direction]))
    router.up.weight.fill_(scale)
    return router


def _scale(sizes: Tensor, share: float, threshold: float) -> float:
    """The scale with which ``share`` of the ``sizes``, in descending order, lead to scores above ``threshold``."""
    count = round(share * len(sizes))
    if count == 0:
        return 0.0
    below = sizes[count] if count < len(sizes) else torch.zeros(())
    middle = (sizes[count - 1] + below) / 2
    return (torch.logit(torch.tensor(threshold, dtype=torch.float64)) / middle.clamp_min(1e-12)).item()

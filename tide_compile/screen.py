"""screen: what thresholds would lead to, from scores on held-out tokens after the model's own prefixes.

A first look, which knows nothing of keys and values that exits leave behind: it says which thresholds are worth
measuring.

Shapes: T tokens, C checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_PRICES = torch.logspace(-2.5, 1, 36)


def thresholds_at(price: float, layers: Sequence[int], num_layers: int) -> dict[int, float]:
    """A token leaves where the chance that it disagrees, 1 - score, is below ``price`` times the share of the layers
    that leaving saves. So one number sets all checkpoints; scores have to be probabilities of agreement."""
    return {n: round(max(0.0, 1 - price * (num_layers - 1 - n) / num_layers), 6) for n in layers}


def screen(scores: Tensor, correct: Tensor, layers: Sequence[int], num_layers: int) -> list[dict[str, float]]:
    """For each of 36 prices, what would come out.

    Args:
        scores, correct: [T, C] of held-out tokens, the latter 1 where the exited state predicts the full model's token.

    Returns:
        Rows with ``price``, ``disagreement`` (share of all tokens) and ``layers saved`` (share of layer passes).
    """
    saves = torch.tensor([(num_layers - 1 - n) / num_layers for n in layers])
    rows = []
    for price in _PRICES.tolist():
        limits = torch.tensor([*thresholds_at(price, layers, num_layers).values()])
        leave = scores > limits
        first = leave.int().argmax(1)
        left = leave.any(1)
        wrong = left & (correct.gather(1, first[:, None]).squeeze(1) == 0)
        rows.append(
            {
                "price": round(price, 6),
                "disagreement": round(wrong.float().mean().item(), 6),
                "layers saved": round((saves[first] * left).mean().item(), 6),
            }
        )
    return rows


def prices_for(table: list[dict[str, float]], disagreements: Sequence[float]) -> list[float]:
    """The largest price of a ``screen`` that keeps each of the disagreements, ascending and each once."""
    found = {
        max((row["price"] for row in table if row["disagreement"] <= most), default=table[0]["price"])
        for most in disagreements
    }
    return sorted(found)

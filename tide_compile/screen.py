"""screen: what thresholds would lead to, from scores on held-out tokens after the model's own prefixes.

A first look, which knows nothing of keys and values that exits leave behind: it says which thresholds are worth
measuring.

Shapes: T tokens, C checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_PRICES = torch.logspace(-2.5, 1, 71)


def thresholds_at(price: float, layers: Sequence[int], num_layers: int) -> dict[int, float]:
    """A token leaves where the chance that it disagrees, 1 - score, is below ``price`` times the share of the layers
    that leaving saves. So one number sets all checkpoints; scores have to be probabilities of agreement."""
    return {n: round(max(0.0, 1 - price * (num_layers - 1 - n) / num_layers), 6) for n in layers}


def screen(scores: Tensor, correct: Tensor, layers: Sequence[int], num_layers: int) -> list[dict[str, float]]:
    """For each of 71 prices, what would come out.

    Args:
        scores, correct: [T, C] of held-out tokens, the latter 1 where the exited state predicts the full model's token.

    Returns:
        Rows with ``price``, ``disagreement`` (share of all tokens) and ``layers saved`` (share of layer passes).
    """
    rows = []
    for price in _PRICES.tolist():
        wrong, exits = leaving(scores, correct, thresholds_at(price, layers, num_layers))
        saved = sum(share * (num_layers - 1 - layer) / num_layers for layer, share in exits.items())
        rows.append({"price": round(price, 6), "disagreement": round(wrong, 6), "layers saved": round(saved, 6)})
    return rows


def leaving(scores: Tensor, correct: Tensor, thresholds: Mapping[int, float]) -> tuple[float, dict[int, float]]:
    """Share of tokens that leave and disagree, and share of tokens that leave by layer; each leaves at the first of its
    C checkpoints, in the order of ``thresholds``, whose threshold its score is above.

    Args:
        scores, correct: [T, C]. thresholds: C, by layer, ascending.
    """
    leave = scores > torch.tensor([*thresholds.values()])
    first = torch.where(leave.any(1), leave.int().argmax(1), len(thresholds))
    counts = first.bincount(minlength=len(thresholds) + 1)[:-1] / len(scores)
    right = torch.cat([correct.bool(), torch.ones(len(correct), 1, dtype=torch.bool)], 1).gather(1, first[:, None])
    return 1 - right.float().mean().item(), dict(zip(thresholds, counts.tolist(), strict=True))


def prices_for(table: list[dict[str, float]], disagreements: Sequence[float]) -> list[float]:
    """The largest price of a ``screen`` that keeps each of the disagreements, ascending and each once."""
    found = {
        max((row["price"] for row in table if row["disagreement"] <= most), default=table[0]["price"])
        for most in disagreements
    }
    return sorted(found)

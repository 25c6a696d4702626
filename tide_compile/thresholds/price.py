"""price: one number that sets the thresholds of all checkpoints, and what exits at it would lead to.

Shapes: T tokens, C checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tide_compile.routers.metadata import SweepRow


def thresholds_at(price: float, layers: Sequence[int], num_layers: int) -> dict[int, float]:
    """A token leaves where the chance that it disagrees, 1 - score, is below ``price`` times the share of the layers
    that leaving saves. So one number sets all checkpoints; scores have to be probabilities of agreement."""
    return {n: round(max(0.0, 1 - price * (num_layers - 1 - n) / num_layers), 6) for n in layers}


def simulate_exits(scores: Tensor, correct: Tensor, thresholds: Mapping[int, float]) -> tuple[float, dict[int, float]]:
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


def prices_for(sweep: Sequence[SweepRow], disagreements: Sequence[float]) -> list[float]:
    """The prices at which ``sweep_prices`` would have found each of the disagreements, between its own prices by linear
    interpolation; ascending and each once."""
    measured = np.maximum.accumulate([row["disagreement"] for row in sweep])
    found = np.interp(disagreements, measured, [row["price"] for row in sweep])
    return sorted({round(price, 6) for price in found.tolist()})

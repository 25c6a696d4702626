"""Streaming statistics of hidden states: memory depends on the model, never on the number of texts.

Shapes: T tokens, C checkpoints, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Gram:
    """Second moments of states X [T, H] and targets Y [T, H], for a ridge regression of Y on X."""

    def __init__(self, hidden_dim: int, device: torch.device) -> None:
        self.count = 0
        self.xx = torch.zeros(hidden_dim, hidden_dim, dtype=torch.float64, device=device)
        self.xy = torch.zeros_like(self.xx)
        self.x = torch.zeros(hidden_dim, dtype=torch.float64, device=device)
        self.y = torch.zeros_like(self.x)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in T more pairs of rows; products in fp32, sums in fp64."""
        x, y = x.float(), y.float()
        self.count += len(x)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.x += x.sum(0)
        self.y += y.sum(0)

    def ridge(self, strength: float) -> tuple[Tensor, Tensor]:
        """``(W [H, H], b [H])`` fp32 with Y ~ X W^T + b, shrunk towards the identity.

        Args:
            strength: penalty on W - I, in units of the median variance of X (a few components of a residual stream
                are a thousand times larger than the rest); b is not penalised.
        """
        n = max(self.count, 1)
        mean_x, mean_y = self.x / n, self.y / n
        xx = self.xx / n - torch.outer(mean_x, mean_x)
        xy = self.xy / n - torch.outer(mean_x, mean_y)
        smallest = 1e-6 * self.xx.diagonal().mean() / n
        penalty = strength * torch.maximum(xx.diagonal().median(), smallest)
        delta = torch.linalg.solve(xx + penalty * torch.eye(len(xx), dtype=xx.dtype, device=xx.device), xy - xx)
        weight = delta.T + torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        return weight.float(), (mean_y - weight @ mean_x).float()


class Reservoir:
    """A uniform sample of a stream of tokens (Vitter's algorithm R), each with its states at all checkpoints.

    Args:
        capacity: tokens kept. width: C + 1 states per token, the last one behind the last layer.
        generator: source of randomness, on the CPU.
    """

    def __init__(
        self, capacity: int, width: int, hidden_dim: int, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        self.states = torch.empty(capacity, width, hidden_dim, dtype=dtype)
        self.seen = 0
        self.generator = generator

    def __len__(self) -> int:
        return min(self.seen, len(self.states))

    def add(self, states: Tensor) -> None:
        """Offer T tokens [T, C + 1, H]."""
        capacity, order = len(self.states), torch.arange(self.seen, self.seen + len(states))
        draw = (torch.rand(len(states), generator=self.generator, dtype=torch.float64) * (order + 1)).long()
        slot = torch.where(order < capacity, order, draw)
        kept = slot < capacity
        self.states[slot[kept]] = states[kept.to(states.device)].to("cpu", self.states.dtype)
        self.seen += len(states)

    def at(self, index: int) -> Tensor:
        """States of the kept tokens at checkpoint ``index``: [T, H]; -1: behind the last layer."""
        return self.states[: len(self), index]

"""statistics: sums and samples of streamed hidden states; memory depends on the model, never on the number of texts.

Two of them can be added, and what comes out does not depend on how the texts were shared out among processes.

Shapes: T tokens, C checkpoints, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


class Gram:
    """Second moments of states X [T, H] and targets Y [T, H], for a ridge regression of Y on X."""

    def __init__(self, hidden_dim: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.xx = torch.zeros(hidden_dim, hidden_dim, dtype=torch.float64, device=device)
        self.xy = torch.zeros_like(self.xx)
        self.x = torch.zeros(hidden_dim, dtype=torch.float64, device=device)
        self.y = torch.zeros_like(self.x)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name; writing into these changes it."""
        return {n: getattr(self, n) for n in ("count", "xx", "xy", "x", "y")}

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in T more pairs of rows; products in fp32, sums in fp64."""
        x, y = x.float(), y.float()
        self.count += len(x)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.x += x.sum(0)
        self.y += y.sum(0)

    def covariance(self) -> Tensor:
        """Of X: [H, H] fp64."""
        n = self.count.clamp_min(1)
        return self.xx / n - torch.outer(self.x / n, self.x / n)

    def ridge(self, strength: float) -> tuple[Tensor, Tensor]:
        """``(W [H, H], b [H])`` fp32 with Y ~ X W^T + b, shrunk towards the identity.

        Args:
            strength: penalty on W - I, in units of the median variance of X (a few components of a residual stream
                are a thousand times larger than the rest); b is not penalised.
        """
        n = self.count.clamp_min(1)
        mean_x, mean_y = self.x / n, self.y / n
        xx = self.covariance()
        xy = self.xy / n - torch.outer(mean_x, mean_y)
        smallest = 1e-6 * self.xx.diagonal().mean() / n
        penalty = strength * torch.maximum(xx.diagonal().median(), smallest)
        delta = torch.linalg.solve(xx + penalty * torch.eye(len(xx), dtype=xx.dtype, device=xx.device), xy - xx)
        weight = delta.T + torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        return weight.float(), (mean_y - weight @ mean_x).float()


class Reservoir:
    """A uniform sample of a stream of tokens, each with its states at all checkpoints: every token draws a number, and
    those with the least are kept. So samples of parts of the stream can be merged into the sample of the whole.

    Args:
        capacity: tokens kept. width: C + 1 states per token, the last one behind the last layer.
    """

    def __init__(self, capacity: int, width: int, hidden_dim: int, dtype: torch.dtype) -> None:
        self.states = torch.zeros(capacity, width, hidden_dim, dtype=dtype)
        self.keys = torch.full((capacity,), torch.inf, dtype=torch.float64)
        self.seen = torch.zeros((), dtype=torch.long)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name; writing into these changes it."""
        return {n: getattr(self, n) for n in ("states", "keys", "seen")}

    @property
    def kept(self) -> dict[str, Tensor]:
        """By name, without the places that no token has taken yet."""
        taken = self.keys.isfinite()
        return {"states": self.states[taken], "keys": self.keys[taken], "seen": self.seen}

    def __len__(self) -> int:
        return int(self.keys.isfinite().sum())

    def add(self, states: Tensor, generator: torch.Generator) -> None:
        """Offer T tokens [T, C + 1, H]; ``generator``, on the CPU, draws their numbers."""
        self.merge(states, torch.rand(len(states), generator=generator, dtype=torch.float64))
        self.seen += len(states)

    def merge(self, states: Tensor, keys: Tensor) -> None:
        """Offer tokens that have drawn their numbers [T]."""
        better = keys < self.keys.max()
        if not better.any():
            return
        states, keys = states[better.to(states.device)], keys[better]
        both = torch.cat([self.keys, keys])
        kept = torch.zeros(len(both), dtype=torch.bool)
        kept[both.topk(len(self.keys), largest=False).indices] = True
        taken = kept[len(self.keys) :]
        slots = (~kept[: len(self.keys)]).nonzero().squeeze(1)
        self.keys[slots] = keys[taken]
        self.states[slots] = states[taken.to(states.device)].to("cpu", self.states.dtype)

    def at(self, index: int) -> Tensor:
        """States of the kept tokens at checkpoint ``index``, in the order of their numbers: [T, H]; -1: behind the last
        layer."""
        return self.states[self.keys.argsort()[: len(self)], index]


@dataclass(slots=True)
class Collected:
    """What the passes over the texts leave behind: states behind ``layers`` and behind the last one, and second moments
    by layer (none for identity exits)."""

    layers: tuple[int, ...]
    grams: dict[int, Gram]
    train: Reservoir
    held_out: Reservoir
    shards: int = 0
    rows: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""
        parts = {"train": self.train.kept, "held_out": self.held_out.kept}
        parts |= {f"gram_{n}": gram.tensors for n, gram in self.grams.items()}
        return {f"{part}.{name}": t for part, tensors in parts.items() for name, t in tensors.items()}

    def states(self, part: Reservoir, layer: int) -> Tensor:
        """[T, H] of one of the parts, behind a layer; -1: behind the last."""
        return part.at(-1 if layer == -1 else self.layers.index(layer))

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over the values of ``tensors()`` of another one of the same sizes, in which nothing has been sampled."""
        parts = {"train": self.train, "held_out": self.held_out} | {f"gram_{n}": g for n, g in self.grams.items()}
        for part, owner in parts.items():
            for name, tensor in owner.tensors.items():
                given = tensors[f"{part}.{name}"]
                (tensor[: len(given)] if tensor.dim() else tensor).copy_(given)

    def merge_processes(self) -> None:
        """Add up what the processes of ``torch.distributed`` have; afterwards each has all of it."""
        for gram in self.grams.values():
            for tensor in gram.tensors.values():
                dist.all_reduce(tensor)
        for reservoir in (self.train, self.held_out):
            mine = {n: t.clone() for n, t in reservoir.tensors.items()}
            for rank in range(dist.get_world_size()):
                theirs = {n: t.clone() for n, t in mine.items()}
                for tensor in theirs.values():
                    dist.broadcast(tensor, rank)
                if rank != dist.get_rank():
                    reservoir.merge(theirs["states"], theirs["keys"])
                    reservoir.seen += theirs["seen"]
        rows = torch.tensor(self.rows)
        dist.all_reduce(rows)
        self.rows = int(rows)

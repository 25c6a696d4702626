"""The networks that decide: what a router computes from the normed state, and how an exit projection maps it.

Shapes: H hidden, D width of a router, R rank, K probe vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tide_compile.kernels.probe import FEATURES, PARTS, probe_features, read_probe


class TokenRouter(nn.Module):
    """The router of tide-inference 0.2.1: ``sigmoid(up(silu(down(x))))`` on the normed state.

    Args:
        hidden_dim: H, of the model's states. bottleneck_dim: D, width of the hidden layer.
    """

    def __init__(self, hidden_dim: int, bottleneck_dim: int = 128) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_dim, bottleneck_dim, bias=False, dtype=torch.float32)
        self.up = nn.Linear(bottleneck_dim, 1, bias=False, dtype=torch.float32)

    def logits(self, normed: Tensor) -> Tensor:
        """[..., H] fp32 -> [...] before the sigmoid."""
        return self.up(nn.functional.silu(self.down(normed))).squeeze(-1)

    def forward(self, normed: Tensor) -> Tensor:
        """[..., H] fp32 -> [...] in 0..1."""
        return torch.sigmoid(self.logits(normed))

    @torch.no_grad()
    def scale_(self, factor: float) -> None:
        """Multiply what the sigmoid takes."""
        self.up.weight.mul_(factor)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By the names that the passes and router files use."""
        return {n.removesuffix(".weight"): t.detach() for n, t in self.state_dict().items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> TokenRouter:
        """The router with these ``tensors``; a ``ProbeRouter`` if they are one's."""
        bottleneck, hidden = tensors["down"].shape
        if PARTS[0] in tensors:
            router: TokenRouter = ProbeRouter(
                hidden, tensors["first"], tensors["second"], tensors["second_bias"], bottleneck
            )
        else:
            router = TokenRouter(hidden, bottleneck)
        router.load_state_dict({f"{n}.weight" if n in ("down", "up") else n: t for n, t in tensors.items()})
        return router.requires_grad_(False)


class ProbeRouter(TokenRouter):
    """A router that also sees how sure the model would be here, through a small vocabulary (``kernels/probe.py``).

    Args:
        hidden_dim: H. bottleneck_dim: D.
        first, second, second_bias: [R, H], [K, R], [K]: from the normed state to logits of the K tokens; not trained
            with the router.
    """

    def __init__(
        self, hidden_dim: int, first: Tensor, second: Tensor, second_bias: Tensor, bottleneck_dim: int = 128
    ) -> None:
        super().__init__(hidden_dim, bottleneck_dim)
        self.register_buffer("first", first)
        self.register_buffer("second", second)
        self.register_buffer("second_bias", second_bias)
        self.inner = nn.Parameter(torch.randn(bottleneck_dim // 4, FEATURES, dtype=torch.float32) / FEATURES**0.5)
        self.inner_bias = nn.Parameter(torch.zeros(bottleneck_dim // 4, dtype=torch.float32))
        self.outer = nn.Parameter(torch.randn(1, bottleneck_dim // 4, dtype=torch.float32) / bottleneck_dim**0.5)
        self.register_buffer("mean", torch.zeros(FEATURES, dtype=torch.float32), persistent=False)
        self.register_buffer("deviation", torch.ones(FEATURES, dtype=torch.float32), persistent=False)

    @torch.no_grad()
    def standardise_(self, normed: Tensor) -> None:
        """Learn on features scaled by what they are for these states [T, H]; only training sees a difference."""
        logits = (normed @ self.first.T) @ self.second.T + self.second_bias
        features = probe_features(logits)
        self.mean, self.deviation = features.mean(0), features.std(0).clamp_min(1e-3)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return super().tensors | {n: t.detach() for n, t in self._reading().items()}

    def _reading(self) -> dict[str, Tensor]:
        """The probe's tensors, with the scaling of features in them."""
        inner = self.inner / self.deviation
        folded = {"inner": inner, "inner_bias": self.inner_bias - inner @ self.mean}
        return {n: folded.get(n, getattr(self, n)) for n in PARTS}

    @torch.no_grad()
    def scale_(self, factor: float) -> None:
        super().scale_(factor)
        self.outer.mul_(factor)

    def logits(self, normed: Tensor) -> Tensor:
        """[..., H] fp32 -> [...] before the sigmoid."""
        return super().logits(normed) + read_probe(normed, *self._reading().values())


class Projection(NamedTuple):
    """``h -> h W^T + b``, or, with ``down``, ``h -> h + (h down^T) W^T + b``.

    Attributes:
        weight: [H, H], or [H, R] with ``down`` [R, H]. bias: [H]. All fp32.
    """

    weight: Tensor
    bias: Tensor
    down: Tensor | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """[..., H] -> [..., H] fp32."""
        x = states.float()
        if self.down is None:
            return nn.functional.linear(x, self.weight, self.bias)
        return x + nn.functional.linear(nn.functional.linear(x, self.down), self.weight, self.bias)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By the names that the passes and router files use."""
        return {n: t.contiguous() for n, t in self._asdict().items() if t is not None}

"""norm: the normalisation in front of the routers, and how it is learnt from what a module returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tide_compile.kernels.route import normalise_reference

_TOLERANCE = {
    torch.float32: 1e-3,
    torch.float64: 1e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 3e-2,
}  # relative to the largest output: rounding of the dtype


@dataclass(slots=True, eq=False)
class Norm:
    """The normalisation in front of every router, usually a copy of the model's final norm.

    Attributes:
        weight: [H] fp32. bias: [H] fp32 or None. eps: added to the mean square. layer_norm: subtract the mean first.
    """

    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-6
    layer_norm: bool = False

    def __call__(self, states: Tensor) -> Tensor:
        """[..., H] -> [..., H] fp32."""
        return normalise_reference(states, self.weight, self.bias, self.eps, self.layer_norm)


@torch.no_grad()
def fit_norm_maybe(
    function: Callable[[Tensor], Tensor], hidden_dim: int, dtype: torch.dtype, device: torch.device
) -> Norm | None:
    """Fit RMSNorm or LayerNorm (weight, bias, eps) to a module by feeding it 64 random rows.

    Args:
        function: maps [T, H] to [T, H]. hidden_dim: H. dtype, device: of its input.

    Returns:
        The parameters in fp32 on the CPU, or None if the module computes neither.
    """
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(64, hidden_dim, generator=generator, dtype=torch.float32) + 0.5).to(device, dtype)
    wanted = function(rows).float().cpu()
    for layer_norm in (False, True):
        unit = _unit(rows.float().cpu(), layer_norm)
        centred = unit - unit.mean(0)
        weight = (centred * wanted).sum(0) / centred.pow(2).sum(0)
        bias = wanted.mean(0) - weight * unit.mean(0)
        error = (wanted - weight * unit - bias).abs().max() / wanted.abs().max()
        if error < _TOLERANCE.get(dtype, 3e-2):
            has_bias = bias.abs().max() > _TOLERANCE.get(dtype, 3e-2) * weight.abs().max()
            bias = bias if has_bias else None
            return Norm(weight, bias, _eps(function, rows * 1e-3, weight, bias, layer_norm), layer_norm)
    return None


def _unit(x: Tensor, layer_norm: bool) -> Tensor:
    x = x - x.mean(-1, keepdim=True) if layer_norm else x
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))


def _eps(
    function: Callable[[Tensor], Tensor], rows: Tensor, weight: Tensor, bias: Tensor | None, layer_norm: bool
) -> float:
    """``eps`` from inputs so small that it matters: scale = 1 / sqrt(mean square + eps)."""
    x = rows.double().cpu()
    x = x - x.mean(-1, keepdim=True) if layer_norm else x
    y = function(rows).double().cpu() - (0 if bias is None else bias)
    scaled = weight.double() * x
    scale = (y * scaled).sum(-1) / scaled.pow(2).sum(-1)
    eps = (scale.pow(-2) - x.pow(2).mean(-1)).median().item()
    return float(f"{max(eps, 0.0):.1e}")

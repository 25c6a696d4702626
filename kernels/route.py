"""tide::route: the router of a checkpoint, from hidden state to decision.

Shapes: B batch, S sequence, H hidden, D bottleneck. The router is the MLP of tide-inference 0.2.1
(``sigmoid(up(silu(down(norm(h)))))``), computed in fp32 whatever the dtype of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normalise_reference(h: Tensor, weight: Tensor, bias: Tensor | None, eps: float, layer_norm: bool) -> Tensor:
    """RMSNorm or LayerNorm of ``h`` [..., H] in fp32."""
    x = h.float()
    if layer_norm:
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
    return x if bias is None else x + bias


def route_reference(
    h: Tensor,
    active: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    threshold: Tensor,
    eps: float,
    layer_norm: bool,
) -> tuple[Tensor, Tensor]:
    """Score every row and decide which leave.

    Args:
        h: [B, S, H] hidden state in fp32, fp16 or bf16.
        active: [B, S] bool; only active rows may leave.
        norm_weight: [H] fp32. norm_bias: [H] fp32 or None.
        down: [D, H] fp32. up: [1, D] fp32.
        threshold: [] fp32; a row leaves when its score is strictly above.

    Returns:
        ``score`` [B, S] fp32 in 0..1 and ``leave`` [B, S] bool. A row with a NaN or an infinity never leaves.
    """
    x = normalise_reference(h, norm_weight, norm_bias, eps, layer_norm)
    hidden = torch.nn.functional.silu(torch.nn.functional.linear(x, down))
    score = torch.sigmoid((hidden * up[0]).sum(-1))
    finite = torch.isfinite(h).all(-1)
    return score, active & finite & (score > threshold.float())


@torch.library.triton_op("tide::route", mutates_args={})
def route(
    h: Tensor,
    active: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    threshold: Tensor,
    eps: float,
    layer_norm: bool,
) -> tuple[Tensor, Tensor]:
    """See ``route_reference``, which is the meaning of this op on every device."""
    return route_reference(h, active, norm_weight, norm_bias, down, up, threshold, eps, layer_norm)

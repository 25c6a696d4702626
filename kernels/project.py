"""tide::project: the exit projection of the rows that leave, scattered into the output buffer.

An affine map per checkpoint from the hidden state there to the one after the last layer, as in the tuned lens
(Belrose et al., 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens").
"""

from __future__ import annotations

import torch
from torch import Tensor


def project_reference(h: Tensor, leave: Tensor, out: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``out`` with the rows that leave replaced by their projection.

    Args:
        h: [B, S, H] hidden state. leave: [B, S] bool. out: [B, S, H], same dtype as ``h``.
        weight: [H, H] and bias: [H], in the dtype they are to be multiplied in.

    Returns:
        [B, S, H] in the dtype of ``h``; a new tensor.
    """
    projected = torch.nn.functional.linear(h.to(weight.dtype), weight, bias).to(h.dtype)
    return torch.where(leave.unsqueeze(-1), projected, out)


@torch.library.triton_op("tide::project", mutates_args={})
def project(h: Tensor, leave: Tensor, out: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See ``project_reference``, which is the meaning of this op on every device."""
    return project_reference(h, leave, out, weight, bias)

"""onednn: private operators of torch that call oneDNN."""

from __future__ import annotations

import torch
from torch import Tensor

NAMES = (
    "torch.ops.mkldnn._linear_pointwise",
    "torch.ops.mkldnn._reorder_linear_weight",
    "torch.ops.mkldnn._nbytes",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported",
    "torch.ops.mkldnn._is_mkldnn_fp16_supported",
)

_SUPPORT = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def can_multiply(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there, and this processor has instructions for products in ``dtype``."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype in _SUPPORT and getattr(torch.ops.mkldnn, _SUPPORT[dtype])())


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] times the transpose of a weight [N, K], as it lies in memory or reordered."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def reordered(weight: Tensor) -> Tensor:
    """A copy of a weight [N, K] in the order in which oneDNN reads it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def bytes_of(copy: Tensor) -> int:
    """Of a weight, reordered or not."""
    return torch.ops.mkldnn._nbytes(copy) if copy.is_mkldnn else copy.nbytes

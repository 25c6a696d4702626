"""The GPUs that the kernels are built for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CAPABILITIES = (70, 75, 80, 86, 89, 90, 100, 120)  # compute capability times ten
_BF16 = 80  # the first with arithmetic in bfloat16


class CardError(RuntimeError):
    """A dtype that a card has no arithmetic for."""


@dataclass(frozen=True, slots=True)
class Card:
    """``capability``: times ten. ``bandwidth``: of its memory, in bytes per second. ``flops``: dense fp16 operations
    per second of its tensor cores."""

    name: str
    capability: int
    bandwidth: float
    flops: float


# Peak memory bandwidth as NVIDIA's data sheets give it: V100 SXM2 ("NVIDIA V100 Tensor Core GPU", 900 GB/s), T4
# ("NVIDIA T4", 320 GB/s; "320+" in the sheet), A100 40 GB ("NVIDIA A100 Tensor Core GPU", 1,555 GB/s), A10G ("NVIDIA
# A10", 600 GB/s: the A10G of AWS g5 instances has no sheet of its own and the same memory), L4 ("NVIDIA L4", 300 GB/s),
# H100 SXM ("NVIDIA H100 Tensor Core GPU", 3.35 TB/s), B200 ("NVIDIA DGX B200": 64 TB/s for eight). Operations from the
# same sheets, halved where a sheet counts sparsity.
CARDS = (
    Card("V100", 70, 900e9, 125e12),
    Card("T4", 75, 320e9, 65e12),
    Card("A100", 80, 1555e9, 312e12),
    Card("A10G", 86, 600e9, 125e12),
    Card("L4", 89, 300e9, 121e12),
    Card("H100", 90, 3350e9, 989e12),
    Card("B200", 100, 8000e9, 2250e12),
)


def card_of(capability: int) -> Card | None:
    """The card of the table with this compute capability, if there is one."""
    return next((c for c in CARDS if c.capability == capability), None)


def check_dtype(dtype: torch.dtype, capability: int, name: str) -> None:
    """Raises:
    CardError: bfloat16 on a card without it.
    """
    if dtype == torch.bfloat16 and capability < _BF16:
        raise CardError(
            f"bfloat16 needs compute capability {_BF16 / 10}, and {name} has {capability / 10}. Load the model in "
            "float16 or float32."
        )


def require_support(*tensors: Tensor) -> None:
    """Raises:
    CardError: a tensor's dtype is not for the GPU it is on.
    """
    for tensor in tensors:
        if tensor.dtype == torch.bfloat16 and tensor.is_cuda and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability(tensor.device)
            check_dtype(tensor.dtype, 10 * major + minor, torch.cuda.get_device_name(tensor.device))

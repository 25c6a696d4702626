"""tide::compact: which rows are still active, in order, by a prefix sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # rows of a line that one step of a program sums up


def compact_reference(active: Tensor, count: int) -> Tensor:
    """Indices of the active rows of each line, in order, filled up with the others, in order.

    Args:
        active: [R, L] bool.
        count: indices wanted per line, 0..L.

    Returns:
        [R, count] int64.
    """
    ahead = active.cumsum(-1)  # active rows up to and with this one
    row = torch.arange(active.shape[-1], device=active.device).expand(active.shape)
    place = torch.where(active, ahead - 1, ahead[..., -1:] + row - ahead)
    return torch.empty_like(place).scatter_(-1, place, row)[..., :count].contiguous()


@triton.jit
def _compact_kernel(active, chosen, length, count, BLOCK_L: tl.constexpr):
    """One program per line: it counts, then goes through the line again with the number of active rows so far."""
    line = tl.program_id(0).to(tl.int64)
    active += line * length
    chosen += line * count
    column = tl.arange(0, BLOCK_L)
    total = 0
    for start in range(0, length, BLOCK_L):
        total += tl.sum(tl.load(active + start + column, mask=start + column < length, other=0).to(tl.int32), 0)
    before = 0
    for start in range(0, length, BLOCK_L):
        row = start + column
        flag = tl.load(active + row, mask=row < length, other=0).to(tl.int32)
        ahead = before + tl.cumsum(flag, 0)
        place = tl.where(flag != 0, ahead - 1, total + row - ahead)
        tl.store(chosen + place, row.to(tl.int64), mask=(row < length) & (place < count))
        before += tl.sum(flag, 0)


def launch_compact(active: Tensor, count: int) -> Tensor:
    """``compact_reference`` by the kernel."""
    lines, length = active.shape
    chosen = torch.empty((lines, count), dtype=torch.int64, device=active.device)
    torch.library.wrap_triton(_compact_kernel)[(lines,)](active.contiguous(), chosen, length, count, BLOCK_L=BLOCK)
    return chosen


@torch.library.triton_op("tide::compact", mutates_args={})
def compact(active: Tensor, count: int) -> Tensor:
    """See ``compact_reference``, which is the meaning of this op on every device."""
    return launch_compact(active, count) if active.is_cuda else compact_reference(active, count)

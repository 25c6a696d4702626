"""tide::scatter: exited rows into the output buffer.

Shapes: B batch, S sequence, T rows = B*S, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from tide_compile.kernels.gpu.autotune import tuned
from tide_compile.kernels.gpu.cards import require_support
from tide_compile.kernels.gpu.rows import rows_of


def scatter_reference(h: Tensor, leave: Tensor, out: Tensor) -> Tensor:
    """``out`` with the rows that leave replaced by those of ``h``.

    Args:
        h: [B, S, H]. leave: [B, S] bool. out: [B, S, H], same dtype as ``h``.

    Returns:
        [B, S, H]; a new tensor.
    """
    return torch.where(leave.unsqueeze(-1), h, out)


def _fits(config: triton.Config, sizes: Mapping[str, object]) -> bool:
    return config.kwargs["BLOCK_H"] <= max(256, sizes["H"])


@tuned(
    [
        triton.Config({"BLOCK_T": 4, "BLOCK_H": 256}, num_warps=4),
        triton.Config({"BLOCK_T": 1, "BLOCK_H": 1024}, num_warps=4),
        triton.Config({"BLOCK_T": 1, "BLOCK_H": 2048}, num_warps=8),
    ],
    ["H"],
    _fits,
)
@triton.jit
def _scatter_kernel(
    h, leave, out, result, rows, h_stride, out_stride,
    H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Program (i, j): a tile of rows and columns. Of each row only the source that it comes from is read."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    leaving = (tl.load(leave + row, mask=row < rows, other=0) != 0)[:, None]
    inside = (row < rows)[:, None] & (column < H)[None, :]
    at = row.to(tl.int64)[:, None]
    new = tl.load(h + at * h_stride + column[None, :], mask=inside & leaving, other=0)
    old = tl.load(out + at * out_stride + column[None, :], mask=inside & ~leaving, other=0)
    tl.store(result + at * H + column[None, :], tl.where(leaving, new, old), mask=inside)


def launch_scatter(h: Tensor, leave: Tensor, out: Tensor) -> Tensor:
    """``scatter_reference`` by the kernel."""
    require_support(h)
    hidden = h.shape[-1]
    x, others = rows_of(h), rows_of(out)
    rows = x.shape[0]
    result = torch.empty(out.shape, dtype=out.dtype, device=out.device)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(rows, meta["BLOCK_T"]), triton.cdiv(hidden, meta["BLOCK_H"])

    torch.library.wrap_triton(_scatter_kernel)[grid](
        x, leave.contiguous(), others, result, rows, x.stride(0), others.stride(0), H=hidden
    )
    return result


@torch.library.triton_op("tide::scatter", mutates_args={})
def scatter(h: Tensor, leave: Tensor, out: Tensor) -> Tensor:
    """See ``scatter_reference``, which is the meaning of this op on every device."""
    return launch_scatter(h, leave, out) if h.is_cuda else scatter_reference(h, leave, out)

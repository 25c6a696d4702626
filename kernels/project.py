"""tide::project: the exit projection of the rows that leave, scattered into the output buffer.

A map per checkpoint from the hidden state there to the one after the last layer, as in the tuned lens (Belrose et al.,
2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens"). Shapes: B batch, S sequence, T rows = B*S,
H hidden, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from tide_compile.kernels.gpu.autotune import INTERPRETED, tuned
from tide_compile.kernels.gpu.cards import require_support
from tide_compile.kernels.gpu.rows import rows_of
from tide_compile.kernels.scatter import launch_scatter


def project_reference(
    h: Tensor,
    leave: Tensor,
    out: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    down: Tensor | None = None,
) -> Tensor:
    """``out`` with the rows that leave replaced by their projection.

    1. identity: no ``weight``; the row itself.
    2. affine: ``weight @ h + bias`` with ``weight`` [H, H].
    3. low rank: ``h + weight @ (down @ h) + bias`` with ``weight`` [H, R] and ``down`` [R, H].

    Args:
        h: [B, S, H] hidden state. leave: [B, S] bool. out: [B, S, H], same dtype as ``h``.
        weight, bias [H], down: in the dtype they are to be multiplied in.

    Returns:
        [B, S, H] in the dtype of ``h``; a new tensor.
    """
    projected = h
    if weight is not None:
        x = h.to(weight.dtype)
        projected = torch.nn.functional.linear(x if down is None else torch.nn.functional.linear(x, down), weight, bias)
        projected = (projected if down is None else x + projected).to(h.dtype)
    return torch.where(leave.unsqueeze(-1), projected, out)


def _fits(config: triton.Config, sizes: Mapping[str, object]) -> bool:
    """No step that is longer than a row."""
    return config.kwargs["BLOCK_K"] <= max(32, sizes["K"])


@tuned(
    [
        triton.Config({"BLOCK_N": 32, "BLOCK_K": 32}, num_warps=4, num_stages=3),
        triton.Config({"BLOCK_N": 32, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    ],
    ["N", "K", "BLOCK_T"],
    _fits,
)
@triton.jit
def _project_kernel(
    x, leave, weight, bias, residual, out, result, rows, x_stride, residual_stride, out_stride,
    N: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_OUT: tl.constexpr,
    WIDEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (i, j): a tile [BLOCK_T, BLOCK_N] of ``x @ weight.T + bias + residual`` [T, N] where rows leave, and of
    ``out`` elsewhere. Nothing is multiplied where no row leaves. WIDEN: multiply in fp32, as exact, what the
    interpreter would take for integers (bf16)."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    leaving = tl.load(leave + row, mask=row < rows, other=0) != 0
    inside = (row < rows)[:, None] & (column < N)[None, :]
    at = row.to(tl.int64)[:, None]
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    if tl.max(leaving.to(tl.int32), 0) != 0:
        step = tl.arange(0, BLOCK_K)
        for start in range(0, K, BLOCK_K):
            k = start + step
            left = tl.load(x + at * x_stride + k[None, :], mask=leaving[:, None] & (k < K)[None, :], other=0)
            tile = weight + column.to(tl.int64)[None, :] * K + k[:, None]
            right = tl.load(tile, mask=(column < N)[None, :] & (k < K)[:, None], other=0)
            left = left.to(weight.dtype.element_ty)
            if WIDEN:
                left, right = left.to(tl.float32), right.to(tl.float32)
            total = tl.dot(left, right, total, input_precision="ieee")
        if HAS_BIAS:
            total += tl.load(bias + column, mask=column < N, other=0).to(tl.float32)[None, :]
        if HAS_RESIDUAL:
            mask = inside & leaving[:, None]
            total += tl.load(residual + at * residual_stride + column[None, :], mask=mask, other=0).to(tl.float32)
    new = total.to(weight.dtype.element_ty).to(result.dtype.element_ty)
    if HAS_OUT:
        mask = inside & ~leaving[:, None]
        old = tl.load(out + at * out_stride + column[None, :], mask=mask, other=0)
        tl.store(result + at * N + column[None, :], tl.where(leaving[:, None], new, old), mask=inside)
    else:
        tl.store(result + at * N + column[None, :], new, mask=inside & leaving[:, None])


def block_of(rows: object) -> int:
    """BLOCK_T for a number of rows; 16 is the least that a matrix product takes."""
    return 16 if isinstance(rows, int) and rows <= 16 else 32


def launch_project(
    h: Tensor,
    leave: Tensor,
    out: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    down: Tensor | None = None,
) -> Tensor:
    """``project_reference`` by the kernel; two launches for a low rank."""
    if weight is None:
        return launch_scatter(h, leave, out)
    require_support(h, weight)
    x, others, leave = rows_of(h), rows_of(out), leave.contiguous()
    rows, residual = x.shape[0], x
    result = torch.empty(out.shape, dtype=h.dtype, device=h.device)
    products = [(weight, result)]
    if down is not None:
        products.insert(0, (down, torch.empty((rows, down.shape[0]), dtype=down.dtype, device=h.device)))
    for matrix, target in products:
        n, k = matrix.shape
        last = target is result

        def grid(meta: dict[str, int], n: int = n) -> tuple[int, int]:
            return triton.cdiv(rows, meta["BLOCK_T"]), triton.cdiv(n, meta["BLOCK_N"])

        torch.library.wrap_triton(_project_kernel)[grid](
            x, leave, matrix.contiguous(), bias.contiguous() if last and bias is not None else matrix, residual, others,
            target, rows, x.stride(0), residual.stride(0), others.stride(0), N=n, K=k,
            HAS_BIAS=last and bias is not None, HAS_RESIDUAL=last and down is not None, HAS_OUT=last,
            WIDEN=INTERPRETED, BLOCK_T=block_of(rows),
        )  # fmt: skip
        x = target
    return result


@torch.library.triton_op("tide::project", mutates_args={})
def project(
    h: Tensor,
    leave: Tensor,
    out: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    down: Tensor | None = None,
) -> Tensor:
    """See ``project_reference``, which is the meaning of this op on every device."""
    run = launch_project if h.is_cuda else project_reference
    return run(h, leave, out, weight, bias, down)

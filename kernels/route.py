"""tide::route: the router of a checkpoint, from hidden state to decision.

Shapes: B batch, S sequence, T rows = B*S, H hidden, D bottleneck. The router is the MLP of tide-inference 0.2.1
(``sigmoid(up(silu(down(norm(h)))))``), computed in fp32 whatever the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from tide_compile.kernels.few_rows import FEW_ROWS, few_rows_linear
from tide_compile.kernels.gpu.autotune import tuned
from tide_compile.kernels.gpu.cards import require_support
from tide_compile.kernels.gpu.rows import rows_of


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
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score every row and decide which leave.

    Args:
        h: [B, S, H] hidden state in fp32, fp16 or bf16.
        active: [B, S] bool; only active rows may leave.
        norm_weight: [H] fp32. norm_bias: [H] fp32 or None.
        down: [D, H] fp32. up: [1, D] fp32.
        threshold: [] fp32; a row leaves when its score is strictly above.
        offset: [B, S] fp32, added to what the sigmoid takes, or None.

    Returns:
        ``score`` [B, S] fp32 in 0..1 and ``leave`` [B, S] bool. A row with a NaN or an infinity never leaves.
    """
    x = normalise_reference(h, norm_weight, norm_bias, eps, layer_norm)
    hidden = torch.nn.functional.silu(few_rows_linear(x, down))
    logit = (hidden * up[0]).sum(-1)
    score = torch.sigmoid(logit if offset is None else logit + offset)
    finite = torch.isfinite(h).all(-1)
    return score, active & finite & (score > threshold.float())


@triton.jit
def _decide(logit, row, inside, active, threshold, score, leave, offset, HAS_OFFSET: tl.constexpr):
    """Sigmoid and threshold test of the rows; a NaN is above nothing."""
    if HAS_OFFSET:
        logit += tl.load(offset + row, mask=inside, other=0)
    value = tl.sigmoid(logit)
    may = tl.load(active + row, mask=inside, other=0) != 0
    tl.store(score + row, value, mask=inside)
    tl.store(leave + row, may & (value > tl.load(threshold).to(tl.float32)), mask=inside)


_WIDEST = 128  # units of the bottleneck in a program; more does not fit the registers
_TILE = 512  # numbers of a tile of ``down`` per warp of a matrix product; more does not fit either


def _fits(config: triton.Config, sizes: Mapping[str, object]) -> bool:
    """Long tiles for one row, short ones for a matrix product, within the registers; none that is longer than a row."""
    block_h = config.kwargs["BLOCK_H"]
    if sizes["BLOCK_T"] == 1:
        return block_h >= 256 and block_h <= max(256, sizes["H"])
    return block_h < 256 and block_h * sizes["BLOCK_D"] <= _TILE * config.num_warps


@tuned(
    [
        triton.Config({"BLOCK_H": 32}, num_warps=4, num_stages=2),
        triton.Config({"BLOCK_H": 32}, num_warps=8, num_stages=2),
        triton.Config({"BLOCK_H": 256}, num_warps=4, num_stages=1),
        triton.Config({"BLOCK_H": 512}, num_warps=8, num_stages=1),
    ],
    ["H", "BLOCK_T", "BLOCK_D"],
    _fits,
)
@triton.jit
def _route_kernel(
    h, active, norm_weight, norm_bias, down, up, threshold, score, leave, parts, offset, rows, row_stride, eps,
    H: tl.constexpr, D: tl.constexpr, LAYER_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Program (i, j): rows [i * BLOCK_T, ..) and units [j * BLOCK_D, ..) of the bottleneck. With SPLIT it writes its
    share of the sum over units to ``parts`` [cdiv(D, BLOCK_D), T]; without, it has them all and decides."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = row < rows
    h += row.to(tl.int64)[:, None] * row_stride
    unit = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    known = unit < D
    column = tl.arange(0, BLOCK_H)

    mean = tl.zeros([BLOCK_T], tl.float32)
    if LAYER_NORM:
        total = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
        for start in range(0, H, BLOCK_H):
            mask = inside[:, None] & (start + column < H)[None, :]
            total += tl.load(h + start + column[None, :], mask=mask, other=0).to(tl.float32)
        mean = tl.sum(total, 1) / H
    squares = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    wrong = tl.zeros([BLOCK_T], tl.int32)  # a tile of it would not fit the registers everywhere
    for start in range(0, H, BLOCK_H):
        mask = inside[:, None] & (start + column < H)[None, :]
        x = tl.load(h + start + column[None, :], mask=mask, other=0).to(tl.float32)
        wrong |= tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 1)
        x = tl.where(mask, x - mean[:, None], 0.0)
        squares += x * x
    scale = tl.rsqrt(tl.sum(squares, 1) / H + tl.cast(eps, tl.float32))  # eps is fp64 under Inductor, fp32 in eager

    if BLOCK_T == 1:
        products = tl.zeros([BLOCK_D, BLOCK_H], tl.float32)
    else:
        hidden = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, H, BLOCK_H):
        at = start + column
        mask = inside[:, None] & (at < H)[None, :]
        x = tl.load(h + at[None, :], mask=mask, other=0).to(tl.float32)
        x = (x - mean[:, None]) * scale[:, None] * tl.load(norm_weight + at, mask=at < H, other=0)[None, :]
        if HAS_BIAS:
            x += tl.load(norm_bias + at, mask=at < H, other=0)[None, :]
        if BLOCK_T == 1:
            tile = down + unit.to(tl.int64)[:, None] * H + at[None, :]
            products += x * tl.load(tile, mask=known[:, None] & (at < H)[None, :], other=0)
        else:
            tile = down + unit.to(tl.int64)[None, :] * H + at[:, None]
            weight = tl.load(tile, mask=known[None, :] & (at < H)[:, None], other=0)
            hidden = tl.dot(x, weight, hidden, input_precision="ieee")
    if BLOCK_T == 1:
        hidden = tl.sum(products, 1)[None, :]

    logit = tl.sum(hidden * tl.sigmoid(hidden) * tl.load(up + unit, mask=known, other=0)[None, :], 1)
    logit = tl.where(wrong == 0, logit, float("nan"))
    if SPLIT:
        tl.store(parts + tl.program_id(1).to(tl.int64) * rows + row, logit, mask=inside)
    else:
        _decide(logit, row, inside, active, threshold, score, leave, offset, HAS_OFFSET)


@triton.jit
def _decide_kernel(
    parts, active, threshold, score, leave, offset, rows, SPLITS: tl.constexpr, HAS_OFFSET: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The sum of the shares, in the same order every time, and the decision."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = row < rows
    logit = tl.zeros([BLOCK_T], tl.float32)
    at = parts + row
    for _ in range(SPLITS):
        logit += tl.load(at, mask=inside, other=0)
        at += rows
    _decide(logit, row, inside, active, threshold, score, leave, offset, HAS_OFFSET)


DECIDE_ROWS = 128  # per program of _decide_kernel


def blocks_of(rows: object, bottleneck: int) -> tuple[int, int]:
    """(BLOCK_T, BLOCK_D) for a number of rows. Few rows make few programs, and each would have to read all of ``down``
    alone: so the bottleneck is split among programs. A symbolic number of rows counts as many."""
    whole = min(max(16, triton.next_power_of_2(bottleneck)), _WIDEST)
    if not isinstance(rows, int) or rows > 1024:
        return 16, whole
    return (1 if rows <= FEW_ROWS else 16), min(16 if rows <= FEW_ROWS else 32, whole)


def launch_route(
    h: Tensor,
    active: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    threshold: Tensor,
    eps: float,
    layer_norm: bool,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``route_reference`` by the kernel; one launch, two when the bottleneck is split."""
    require_support(h)
    hidden, bottleneck = h.shape[-1], down.shape[0]
    x = rows_of(h)
    rows = x.shape[0]
    score = torch.empty(active.shape, dtype=torch.float32, device=h.device)
    leave = torch.empty(active.shape, dtype=torch.bool, device=h.device)
    block_t, block_d = blocks_of(rows, bottleneck)
    splits = triton.cdiv(bottleneck, block_d)
    parts = score if splits == 1 else torch.empty((splits, rows), dtype=torch.float32, device=h.device)
    active = active.contiguous()
    added = score if offset is None else offset.contiguous()
    torch.library.wrap_triton(_route_kernel)[(triton.cdiv(rows, block_t), splits)](
        x, active, norm_weight.contiguous(), norm_weight if norm_bias is None else norm_bias.contiguous(),
        down.contiguous(), up.contiguous(), threshold, score, leave, parts, added, rows, x.stride(0), eps,
        H=hidden, D=bottleneck, LAYER_NORM=layer_norm, HAS_BIAS=norm_bias is not None, SPLIT=splits > 1,
        HAS_OFFSET=offset is not None, BLOCK_T=block_t, BLOCK_D=block_d,
    )  # fmt: skip
    if splits > 1:
        torch.library.wrap_triton(_decide_kernel)[(triton.cdiv(rows, DECIDE_ROWS),)](
            parts, active, threshold, score, leave, added, rows, SPLITS=splits, HAS_OFFSET=offset is not None,
            BLOCK_T=DECIDE_ROWS,
        )  # fmt: skip
    return score, leave


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
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``route_reference``, which is the meaning of this op on every device."""
    run = launch_route if h.is_cuda else route_reference
    return run(h, active, norm_weight, norm_bias, down, up, threshold, eps, layer_norm, offset)

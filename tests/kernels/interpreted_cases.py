"""Run by test_ops.py in a process of its own with TRITON_INTERPRET=1: ``triton.jit`` looks at it at import.

Every case runs a launcher under Triton's interpreter on the CPU and compares it with the reference. What a launcher
allocates is poisoned with NaN (or a number that is no index), so that a row that was not written shows.
"""

from __future__ import annotations

import itertools
import sys
from contextlib import contextmanager
from unittest import mock

import torch

from tide_compile.kernels import compact, project, route, scatter

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {
    F32: 2e-5,  # sums of up to 5,120 numbers in another order
    F16: 2e-3,  # one rounding to 11 bits more or less
    BF16: 2e-2,  # one rounding to 8 bits more or less
}
ROWS, HIDDEN, BOTTLENECKS = (1, 3, 63, 100, 577, 2000), (64, 576, 768, 4096, 5120), (16, 100, 256)
_empty = torch.empty


@contextmanager
def poisoned():
    """``torch.empty`` gives NaN, True (for bool) or -7 (for int)."""

    def empty(*args, **kwargs):
        value = _empty(*args, **kwargs)
        if value.is_floating_point():
            return value.fill_(float("nan"))
        return value.fill_(True if value.dtype == torch.bool else -7)

    with mock.patch("torch.empty", empty):
        yield


def close(got, want, dtype, bound=None):
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    largest = max(want.float().nan_to_num(0, 0, 0).abs().flatten().tolist(), default=1.0)
    atol = TOLERANCE[bound or dtype] * max(1.0, largest)
    torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=atol, equal_nan=True)


def states(rows, hidden, dtype, seed=0, strange=True):
    """[B, S, H] with a mean that is not zero, and, where there are rows to spare, a NaN and two infinities."""
    torch.manual_seed(seed)
    batch = 3 if rows % 3 == 0 and rows > 3 else 1
    h = (torch.randn(batch, rows // batch, hidden) * 2 + 0.5).to(dtype)
    if strange and rows >= 63:
        flat = h.view(-1, hidden)
        flat[1, hidden - 1], flat[17, 0], flat[rows - 1, 3] = float("nan"), float("inf"), float("-inf")
    return h


def router(hidden, bottleneck, bias):
    torch.manual_seed(1)
    return (
        torch.rand(hidden) + 0.5, torch.randn(hidden) / 4 if bias else None,
        torch.randn(bottleneck, hidden) / hidden**0.5, torch.randn(1, bottleneck) / bottleneck**0.5 * 4,
    )  # fmt: skip


def check_route(h, layer_norm=False, bias=False, bottleneck=16, threshold=None, bound=F32, offset=False):
    """Scores, and decisions at a threshold that is far from every score."""
    weights = router(h.shape[-1], bottleneck, bias)
    active = torch.rand(h.shape[:2]) > 0.2
    ask, rest = (h, active, *weights), (1e-5, layer_norm, torch.randn(h.shape[:2]) if offset else None)
    score, _ = route.route_reference(*ask, torch.tensor(0.5), *rest)
    known = score[score.isfinite()].sort().values
    if threshold is None:
        gaps = known.diff() if len(known) > 1 else torch.tensor([])
        middle = int(gaps.argmax()) if len(gaps) else 0
        threshold = float(known[middle : middle + 2].mean()) if len(known) > 1 else 0.5 * float(known.sum())
    threshold = torch.tensor(threshold)
    want_score, want_leave = route.route_reference(*ask, threshold, *rest)
    with poisoned():
        got_score, got_leave = route.launch_route(*ask, threshold, *rest)
    close(got_score, want_score, F32, bound)
    assert torch.equal(got_leave, want_leave), (got_leave != want_leave).sum()
    finite = h.isfinite().all(-1)
    assert got_score[~finite].isnan().all() and not got_leave[~finite].any()


def check_compact(lines, length, count, share):
    torch.manual_seed(length)
    active = torch.rand(lines, length) < share
    with poisoned():
        got = compact.launch_compact(active, count)
    order = torch.argsort(active.logical_not().to(torch.uint8), dim=-1, stable=True)
    assert torch.equal(got, order[:, :count]), "not the active rows in order, then the others"
    assert torch.equal(compact.compact_reference(active, count), order[:, :count])


def check_scatter(h, share=0.5):
    out = torch.randn(h.shape).to(h.dtype)
    leave = torch.rand(h.shape[:2]) < share
    with poisoned():
        got = scatter.launch_scatter(h, leave, out)
    torch.testing.assert_close(got, scatter.scatter_reference(h, leave, out), rtol=0, atol=0, equal_nan=True)


def check_project(h, kind, share=0.5, dtype=None):
    dtype, hidden = dtype or h.dtype, h.shape[-1]
    torch.manual_seed(2)
    tall, wide = torch.randn(hidden, 24).to(dtype), (torch.randn(24, hidden) / hidden**0.5).to(dtype)
    square, bias = (torch.randn(hidden, hidden) / hidden**0.5).to(dtype), torch.randn(hidden).to(dtype)
    maps = {"identity": (), "affine": (square, bias), "linear": (square, None), "low rank": (tall, bias, wide)}[kind]
    out = torch.randn(h.shape).to(h.dtype)
    leave = torch.rand(h.shape[:2]) < share
    with poisoned():
        got = project.launch_project(h, leave, out, *maps)
    coarser = max(h.dtype, dtype, key=TOLERANCE.get)
    close(got, project.project_reference(h, leave, out, *maps), h.dtype, F32 if kind == "identity" else coarser)
    assert torch.equal(got[~leave], out[~leave])


def main(every: bool) -> int:
    sizes = [(1, 576), (3, 64), (63, 576), (100, 64), (200, 64), (1, 2048)]
    if every:
        sizes = list(itertools.product(ROWS, HIDDEN))
    done = 0
    for i, (rows, hidden) in enumerate(sizes):
        dtypes = (F32, F16, BF16) if every and rows <= 100 else ((F32, F16, BF16)[i % 3],)
        tiles = -(-rows // 16) * (hidden // 32) ** 2  # of a square map: the interpreter takes about 1 ms for each
        for dtype in dtypes:
            h = states(rows, hidden, dtype)
            norms = ((False, False), (True, True), (False, True), (True, False))[done % 2 * 2 if every else 0 :]
            for layer_norm, bias in norms[: 2 if rows * hidden < (1e6 if every else 1e4) else 1]:
                check_route(h, layer_norm, bias, BOTTLENECKS[(i + done) % 3], offset=done % 2 == 1)
                done += 1
            check_scatter(h)
            kinds = ["identity", "low rank"]
            if tiles < 3_000:
                kinds += ["affine", "linear"]
            elif every and tiles < 50_000 and dtype == dtypes[i % len(dtypes)]:
                kinds += [("affine", "linear")[i % 2]]
            for kind in kinds:
                check_project(states(rows, hidden, dtype, strange=False), kind)
                done += 1
            done += 1
            print(f"{rows} x {hidden} {dtype}", flush=True)
    for dtype in (F32, F16, BF16):  # each in a product too, with something that is not finite
        check_route(states(63, 64, dtype), True, True, 100 if dtype == F16 else 256)
        check_project(states(21, 64, dtype, strange=False), "affine")
        done += 2
    check_route(states(1100, 64, F32), bottleneck=100)  # more rows than are split: one launch decides
    check_route(torch.cat([states(21, 64, F32)] * 4, -1)[..., 64:128])  # rows that lie apart
    check_route(states(63, 64, F32).transpose(0, 1))  # rows that are no view
    check_route(states(63, 64, F32).transpose(1, 2).contiguous().transpose(1, 2))  # columns that lie apart
    check_route(states(2, 64, F32).transpose(1, 2).contiguous().transpose(1, 2), layer_norm=True)
    for empty in (torch.empty(0, 3, 64), torch.empty(2, 0, 64)):
        check_route(empty)
        check_scatter(empty)
        check_project(empty, "affine")
    check_route(torch.zeros(1, 3, 64))  # nothing but eps under the root
    lifted = states(63, 64, F32) * 0.1 + 100  # E[x^2] - E[x]^2 would lose the variance to rounding
    check_route(lifted, layer_norm=True, bound=F16)  # of the mean, the reference's and ours differ by rounding
    for lines, length, count, share in [
        (1, 1, 1, 1), (1, 3, 2, 0.5), (2, 63, 40, 0.5), (1, 100, 100, 0.0), (3, 577, 300, 0.9), (1, 2000, 1200, 0.6),
        (1, 2000, 2000, 1.0), (2, 1025, 7, 0.01), (4, 0, 0, 0.5), (0, 5, 3, 0.5), (2, 9, 0, 0.5),
    ]:  # fmt: skip
        check_compact(lines, length, count, share)
        done += 1
    h = states(100, 64, F32)
    for share in (0.0, 1.0):
        check_scatter(h, share)
        check_project(states(100, 64, F32, strange=False), "affine", share)
    check_scatter(torch.cat([h, h], -1)[..., 64:])
    check_project(torch.cat([states(21, 64, F16)] * 2, -1)[..., 64:], "low rank")
    check_project(states(21, 64, F32), "affine", dtype=BF16)
    check_project(states(21, 64, BF16), "affine", dtype=F32)
    done += 20
    trap()
    kept_apart()
    print(f"{done + 2} cases")
    return 0


def trap():
    """A threshold in fp64 that is below a score but rounds to it in fp32: nothing is strictly above it."""
    for rows in (1, 100):
        h, active, weights = states(rows, 64, F32, strange=False), None, router(64, 16, False)
        active = torch.ones(h.shape[:2], dtype=torch.bool)
        score, _ = route.launch_route(h, active, *weights, torch.tensor(0.0), 1e-6, False)
        top = score.max().double() - 1e-12
        assert top < score.max().double() and top.float() == score.max()
        for threshold in (top, top.float()):
            _, leave = route.launch_route(h, active, *weights, threshold, 1e-6, False)
            assert not leave.any(), "compared in fp64"


def kept_apart():
    """Rows that do not leave may hold anything: they spoil no other row of their tile."""
    h = states(21, 64, F32, strange=False)
    leave = torch.zeros(h.shape[:2], dtype=torch.bool)
    leave.view(-1)[5] = True
    spoiled = h.clone()
    spoiled.view(-1, 64)[torch.arange(21) != 5] = float("nan")
    out, weight, bias = torch.randn_like(h), torch.randn(64, 64), torch.randn(64)
    want = project.project_reference(h, leave, out, weight, bias)
    close(project.launch_project(spoiled, leave, out, weight, bias), want, F32)


if __name__ == "__main__":
    sys.exit(main("--every" in sys.argv))

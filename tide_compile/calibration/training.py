"""training: the loop, the loss and the precision that all distillation here shares.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tide_compile.routers.networks import Projection

_CHECKS = 4  # times that held-out data judges on the way


@torch.no_grad()
def descend(
    parameters: Sequence[nn.Parameter],
    losses: Callable[[int], Iterable[Tensor]],
    steps: int,
    rate: float,
    judge: Callable[[], float] | None = None,
    label: str | None = None,
) -> None:
    """Train ``parameters`` in place by Adam, at a ``rate`` that falls to nothing along a half cosine.

    They are left at the best of the beginning and four points of the way, by ``judge``; without one, at the end. No
    other tensor gets a gradient.

    Args:
        losses: of step 1, 2, ... ``steps``: parts that add up, each made only when the one before it has been
            differentiated, so that the memory is that of one part.
        steps: at least 1.
        judge: what is to be small, on held-out data.
        label: of a progress bar; None: there is none.
    """
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    least, best = judge() if judge else None, _copies(parameters)
    for step in tqdm(range(1, steps + 1), label, unit="step", disable=label is None):
        with torch.enable_grad():
            for loss in losses(step):
                _add_gradients(parameters, loss)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if judge and (step % -(-steps // _CHECKS) == 0 or step == steps):
            found = judge()
            if found < least:
                least, best = found, _copies(parameters)
    if judge:
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)


def _copies(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def _add_gradients(parameters: Sequence[nn.Parameter], loss: Tensor) -> None:
    """As ``loss.backward()``, but the model's own weights get none."""
    if not loss.requires_grad:  # no parameter had a part in it
        return
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def trainable(projection: Projection, device: torch.device) -> Projection:
    """A copy of a map with parameters in place of its tensors, fp32."""
    return Projection(**{n: nn.Parameter(t.to(device, torch.float32).clone()) for n, t in projection.tensors.items()})


def detached(projection: Projection) -> Projection:
    """A ``trainable`` map as plain tensors on the CPU."""
    return Projection(**{n: t.detach().cpu() for n, t in projection.tensors.items()})


def kl(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence, in nats, of the distribution of logits ``ours`` [T, V] from that of
    ``theirs``."""
    return nn.functional.kl_div(
        ours.float().log_softmax(-1), theirs.float().log_softmax(-1), reduction="batchmean", log_target=True
    )


def mixed_precision(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """For training beside a model in ``dtype``: bfloat16 products in place of float32 ones where a CPU has them, which
    takes half the time or less."""
    able = torch.cpu.get_capabilities()
    if device.type == "cpu" and dtype == torch.float32 and any(able.get(n) for n in ("amx_bf16", "avx512_bf16")):
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()

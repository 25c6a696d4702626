"""fit_maps: exit projections (from a checkpoint's state to the last one) and shortcuts (past one layer).

Both are fitted in closed form; projections are distilled after it.

Shapes: T tokens, H hidden, V vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tide_compile.calibration.statistics import Gram
from tide_compile.calibration.training import descend, detached, kl, trainable
from tide_compile.routers.networks import Projection

_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
_BATCH = 256  # tokens in a step of distillation
_CHUNK = 128  # of them at a time: logits over a whole vocabulary take long to find memory for
_RATE = 1e-4
_JUDGED = 2048  # held-out tokens that judge it

Head = Callable[[Tensor], Tensor]  # states [T, H] behind the last layer -> logits [T, V], differentiable


def fit_affine(gram: Gram, states: Tensor, targets: Tensor) -> Projection:
    """By ridge regression; the penalty is the one of four that does best on held-out ``states`` and ``targets`` [T, H].

    As the translators of Belrose et al. (2023), "Eliciting Latent Predictions from Transformers with the Tuned Lens",
    here in closed form.
    """
    candidates = [Projection(*(t.cpu() for t in gram.ridge(s))) for s in _STRENGTHS]
    errors = [(c(states) - targets.float()).pow(2).mean().item() for c in candidates]
    return candidates[min(range(len(errors)), key=errors.__getitem__)]


def factor(affine: Projection, gram: Gram, rank: int) -> Projection:
    """The low-rank projection whose outputs are nearest to the affine one's: W - I, cut to its ``rank`` largest
    singular values in the metric of the states' covariance (reduced-rank regression, Izenman 1975)."""
    delta = affine.weight.double() - torch.eye(len(affine.weight), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(gram.covariance().cpu())
    root = values.clamp_min(values.max() * 1e-9).sqrt()
    left, sizes, right = torch.linalg.svd((delta @ vectors) * root, full_matrices=False)
    down = (right[:rank] / root) @ vectors.T
    weight = left[:, :rank] * sizes[:rank]
    mean = (gram.x / gram.count.clamp_min(1)).cpu()
    bias = affine.bias.double() + (delta - weight @ down) @ mean
    scale = sizes[:rank].clamp_min(1e-12).sqrt()  # both factors of one size, for the optimiser
    return Projection((weight / scale).float(), bias.float(), (down * scale[:, None]).float())


def fit_shortcut(before: Tensor, behind: Tensor, rank: int, strength: float = 1e-2) -> Projection:
    """What a skipped layer does to a state, as ``s + W (V s) + b`` of low rank: reduced-rank ridge regression.

    Errors count relative to the size of the state behind the layer, as they do behind the norm that keys and values are
    made through. After the linear shortcuts of Din et al. (2023), "Jump to Conclusions: Short-Cutting Transformers With
    Linear Transformations", here from layer to layer, so that one set of maps serves all checkpoints.

    Args:
        before, behind: states [T, H] of the same tokens. strength: penalty, in units of the median variance.
    """
    x, y = before.double(), behind.double()
    share = 1 / y.pow(2).mean(-1, keepdim=True).clamp_min(1e-12)
    share = share / share.mean()
    mean_x, mean_step = (share * x).mean(0), (share * (y - x)).mean(0)
    x, step = x - mean_x, y - x - mean_step
    covariance = (share * x).T @ x / len(x)
    penalty = strength * covariance.diagonal().median().clamp_min(1e-12)
    solved = torch.linalg.solve(
        covariance + penalty * torch.eye(len(covariance), dtype=x.dtype), (share * x).T @ step / len(x)
    )
    values, vectors = torch.linalg.eigh(covariance)
    root = values.clamp_min(values.max() * 1e-9).sqrt()
    left, sizes, right = torch.linalg.svd(root[:, None] * (vectors.T @ solved), full_matrices=False)
    scale = sizes[:rank].clamp_min(1e-12).sqrt()
    down = ((vectors / root) @ left[:, :rank] * scale).T
    weight = right[:rank].T * scale
    bias = mean_step - weight @ (down @ mean_x)
    return Projection(weight.float(), bias.float(), down.float())


def distil(
    projection: Projection,
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    head: Head,
    steps: int,
    seed: int,
    device: torch.device,
) -> Projection:
    """Bring the distribution after the projection closer to the full model's (Kullback-Leibler divergence, as in the
    tuned lens), where that helps on held-out tokens.

    Args:
        train, held_out: states at the checkpoint and behind the last layer, [T, H] each.
        head: of the model. steps: of 256 tokens. seed: of their order. device: where to compute.

    Returns:
        The best of the given projection and those seen at four points of the way, by held-out divergence.
    """
    if not steps:
        return projection
    current = trainable(projection, device)
    parameters = [p for p in current if p is not None]
    generator = torch.Generator().manual_seed(seed)
    judged = tuple(t[:_JUDGED] for t in held_out)

    def losses(_: int) -> Iterator[Tensor]:
        chosen = torch.randint(len(train[0]), (_BATCH,), generator=generator)
        for x, y in zip(*(t[chosen].to(device).split(_CHUNK) for t in train), strict=True):
            yield kl(head(current(x)), head(y).detach()) * len(x) / _BATCH

    descend(parameters, losses, steps, _RATE, lambda: divergence(current, *judged, head, device))
    return detached(current)


def projected(projection: Projection | None, states: Tensor) -> Tensor:
    """[T, H] -> [T, H] fp32; None is the identity."""
    return states.float() if projection is None else projection(states)


@torch.no_grad()
def divergence(
    projection: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, head: Head, device: object
) -> float:
    """Mean Kullback-Leibler divergence, in nats, of what follows the projected states from what follows the targets."""
    total = 0.0
    for x, y in zip(states.split(_CHUNK), targets.split(_CHUNK), strict=True):
        x, y = x.to(device), y.to(device)
        total += kl(head(projection(x)), head(y)).item() * len(x)
    return total / max(1, len(states))

"""train_routers: routers, and the probes that some of them look through, from a bounded sample of tokens.

Shapes: T tokens, H hidden, D width of a router, R rank, K probe vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tide_compile.calibration.training import descend, kl
from tide_compile.routers.networks import ProbeRouter, TokenRouter

_PATIENCE = 5  # epochs without improvement on held-out tokens
_EPOCHS = 30
_PROBE_STEPS, _PROBE_BATCH, _PROBE_RATE = 1000, 512, 3e-4  # a batch in tokens


def train_router(
    router: TokenRouter, train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], seed: int
) -> TokenRouter:
    """Train a router by binary cross-entropy.

    There are no class weights, whatever the balance of the classes: scores have to be probabilities. What they lack of
    that on held-out tokens is mended at the end by a temperature (Guo et al., 2017, "On Calibration of Modern Neural
    Networks").

    Args:
        router: to be trained in place.
        train, held_out: normed states [T, H] fp32 and labels [T] in {0, 1}. The epoch with the lowest held-out loss
            is kept; training stops when it has not improved for 5 epochs.
        seed: of the order.
    """
    states, labels = train
    generator = torch.Generator().manual_seed(seed)
    if isinstance(router, ProbeRouter):
        router.standardise_(states)
    router.requires_grad_(True)
    optimizer = torch.optim.AdamW(router.parameters(), lr=1e-3, weight_decay=1e-2)
    best, best_state, stale = float("inf"), None, 0
    size = max(32, min(256, len(states) // 16))
    for _ in range(_EPOCHS):
        for batch in torch.randperm(len(states), generator=generator).split(size):
            with torch.enable_grad():
                loss = nn.functional.binary_cross_entropy_with_logits(router.logits(states[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        with torch.no_grad():
            loss = nn.functional.binary_cross_entropy_with_logits(router.logits(held_out[0]), held_out[1]).item()
        stale += 1
        if best_state is None or loss < best:
            best, stale = loss, 0
            best_state = {n: t.clone() for n, t in router.state_dict().items()}
        if stale == _PATIENCE:
            break
    router.load_state_dict(best_state)
    router.requires_grad_(False)
    router.scale_(_temperature(router.logits(held_out[0]), held_out[1]))
    return router


def fit_probe(states: Tensor, logits: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The map of rank R from normed states [T, H] to ``logits`` [T, K] of the full model: in closed form, then
    distilled (Kullback-Leibler divergence within the K tokens).

    Returns:
        ``first`` [R, H], ``second`` [K, R], ``second_bias`` [K], fp32.
    """
    first, second, bias = (nn.Parameter(t.contiguous()) for t in _reduced_rank(states, logits, rank))
    generator = torch.Generator().manual_seed(seed)

    def losses(_: int) -> Iterator[Tensor]:
        batch = torch.randint(len(states), (_PROBE_BATCH,), generator=generator)
        yield kl(nn.functional.linear(states[batch] @ first.T, second, bias), logits[batch])

    descend([first, second, bias], losses, _PROBE_STEPS, _PROBE_RATE)
    return first.detach(), second.detach(), bias.detach()


def _reduced_rank(states: Tensor, logits: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(first, second, bias)`` of ``fit_probe``: ridge regression, cut to its largest singular values in the metric of
    the states' covariance (reduced-rank regression, Izenman 1975); both factors of one size."""
    mean_x, mean_y = states.mean(0), logits.mean(0)
    x = (states - mean_x).double()
    gram = x.T @ x / len(x)
    gram += 1e-2 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    cross = x.T @ (logits - mean_y).double() / len(x)
    weight = torch.linalg.solve(gram, cross)  # [H, K]
    values, vectors = torch.linalg.eigh(gram)
    root = values.sqrt()
    left, sizes, right = torch.linalg.svd(root[:, None] * (vectors.T @ weight), full_matrices=False)
    half = sizes[:rank].sqrt()
    first = ((vectors / root) @ left[:, :rank] * half).T.float()
    second = (right[:rank].T * half).float()
    return first, second, mean_y - second @ (first @ mean_x)


def _temperature(logits: Tensor, labels: Tensor) -> float:
    """The factor on the logits with the least cross-entropy."""
    factors = torch.logspace(-0.5, 0.5, 41)
    losses = torch.stack([nn.functional.binary_cross_entropy_with_logits(logits * f, labels) for f in factors])
    return factors[losses.argmin()].item()

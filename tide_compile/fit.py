"""Fitting: exit projections in closed form, routers by gradient descent on a bounded sample.

Shapes: T tokens, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tide_compile.collect import Gram
from tide_compile.routers import TokenRouter

_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
_PATIENCE = 10  # epochs without improvement on held-out tokens


def fit_projection(gram: Gram, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The affine map ``(W, b)`` from a checkpoint's state to the last one, by ridge regression.

    The penalty is the one of four that does best on held-out ``states`` and ``targets`` [T, H]. As the translators of
    Belrose et al. (2023), "Eliciting Latent Predictions from Transformers with the Tuned Lens", here in closed form.
    """
    candidates = [gram.ridge(s) for s in _STRENGTHS]
    x, y = states.float(), targets.float()
    errors = [(nn.functional.linear(x, w.cpu(), b.cpu()) - y).pow(2).mean().item() for w, b in candidates]
    weight, bias = candidates[min(range(len(errors)), key=errors.__getitem__)]
    return weight.cpu(), bias.cpu()


def train_router(
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    bottleneck_dim: int,
    seed: int,
    epochs: int = 100,
) -> TokenRouter:
    """Train a router by binary cross-entropy (no class weights, so that scores are probabilities).

    Args:
        train, held_out: normed states [T, H] fp32 and labels [T] in {0, 1}. The epoch with the lowest held-out loss
            is kept; training stops when it has not improved for 10 epochs.
        bottleneck_dim: width of the router.
        seed: of initialisation and order.
        epochs: at most this many passes.
    """
    states, labels = train
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        router = TokenRouter(states.shape[1], bottleneck_dim)
        optimizer = torch.optim.AdamW(router.parameters(), lr=1e-3, weight_decay=1e-2)
        best, best_state, stale = float("inf"), router.state_dict(), 0
        for _ in range(epochs):
            for batch in torch.randperm(len(states)).split(max(32, min(256, len(states) // 16))):
                loss = nn.functional.binary_cross_entropy_with_logits(router.logits(states[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                loss = nn.functional.binary_cross_entropy_with_logits(router.logits(held_out[0]), held_out[1]).item()
            stale += 1
            if loss < best:
                best, stale = loss, 0
                best_state = {n: t.clone() for n, t in router.state_dict().items()}
            if stale == _PATIENCE:
                break
    router.load_state_dict(best_state)
    return router.requires_grad_(False)

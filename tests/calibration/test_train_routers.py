"""Routers learn, and see how sure the model would be."""

import pytest
import torch

from tide_compile.calibration.quality import calibration_error, reliability
from tide_compile.calibration.train_routers import fit_probe, train_router
from tide_compile.routers.networks import ProbeRouter, TokenRouter


def test_router_learns_and_repeats():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2100, 16, generator=generator)
    y = (x[:, 0] > 0).float()
    routers = []
    for _ in range(2):
        torch.manual_seed(4)
        routers.append(train_router(TokenRouter(16, 8), (x[:2000], y[:2000]), (x[2000:], y[2000:]), seed=4))
    first, second = routers
    assert ((first(x[2000:]) > 0.5) == (y[2000:] > 0.5)).float().mean() > 0.9
    assert torch.equal(first.down.weight, second.down.weight)


def test_probe_makes_the_difference():
    """Labels that hang on how sure a distribution is. Catches a probe that is not trained, or not looked at."""
    torch.manual_seed(0)
    states, head = torch.randn(3000, 16), torch.randn(32, 16)
    logits = states @ head.T
    labels = (logits.softmax(-1).amax(-1) > 0.9).float()
    parts = fit_probe(states[:2500], logits[:2500], 16, seed=0)
    fitted = (states @ parts[0].T) @ parts[1].T + parts[2]
    assert (fitted.argmax(-1) == logits.argmax(-1)).float().mean() > 0.95
    router = ProbeRouter(16, *parts, 16)
    train_router(router, (states[:2500], labels[:2500]), (states[2500:], labels[2500:]), seed=0)
    scores = router(states[2500:])
    assert ((scores > 0.5) == (labels[2500:] > 0.5)).float().mean() > 0.95
    assert calibration_error(reliability(scores, labels[2500:])) < 0.05


def test_reliability_and_error():
    curve = reliability(torch.tensor([0.05, 0.95, 0.95, 0.95]), torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert [row["tokens"] for row in curve] == [1, 3]
    assert calibration_error(curve) == pytest.approx((0.05 + 3 * abs(0.95 - 2 / 3)) / 4, abs=1e-3)

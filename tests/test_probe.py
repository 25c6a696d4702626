"""Routers that see how sure the model would be, and projections that are refined."""

import pytest
import torch

from tests.support.compare import check, threshold_between
from tests.support.models import FEW, SETTINGS, probing, tiny
from tide_compile import RouterBank
from tide_compile.calibration.fit_maps import distil, divergence, factor, fit_affine
from tide_compile.calibration.quality import calibration_error, reliability
from tide_compile.calibration.statistics import Gram
from tide_compile.calibration.train_routers import fit_probe, train_router
from tide_compile.kernels.probe import probe_features
from tide_compile.routers.networks import ProbeRouter, Projection


@pytest.fixture
def bank():
    return probing(FEW)


@pytest.mark.parametrize(
    ("batch", "lowering"),
    [(1, "eager"), (3, "eager"), pytest.param(1, "inductor", marks=pytest.mark.slow)],
)
def test_compiled_equals_the_reference(bank, batch, lowering, tmp_path):
    """Probe and low-rank projection, from a file. Catches a tensor in the wrong place of the op."""
    model, bank = tiny("rmsnorm-rope-gqa", layers=FEW), RouterBank.load(bank.save(tmp_path / "r.safetensors"))
    assert bank.exit_strategy == "low_rank"
    settings = {**SETTINGS, "lowering": lowering}
    threshold = threshold_between(model, bank, 0.5, "static", batch, **settings)
    stats = check(model, bank, "static", batch, threshold, **settings)
    assert 0 < stats.exit_rate < 1


def test_features_of_a_distribution():
    """Catches a tie or an order that is lost, and an entropy of the wrong sign."""
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    top1, top2, top3, entropy, total = probe_features(logits)[0].tolist()
    shares = logits.log_softmax(-1)[0].sort(descending=True).values.tolist()
    assert [top1, top2, top3] == pytest.approx(shares[:3])
    assert entropy == pytest.approx(torch.distributions.Categorical(logits=logits).entropy().item(), rel=1e-5)
    assert total == pytest.approx(logits.logsumexp(-1).item())


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


def test_projections():
    """A factored map of full rank is the affine one; distillation never makes the held-out divergence larger, and finds
    the map where the regression has none."""
    torch.manual_seed(0)
    x, head = torch.randn(2000, 16), torch.randn(40, 16)
    y = x @ torch.randn(16, 16) + 1
    gram = Gram(16)
    gram.add(x, y)
    affine = fit_affine(gram, x, y)
    whole, half = factor(affine, gram, 16), factor(affine, gram, 2)
    assert torch.allclose(whole(x), affine(x), atol=1e-2)
    assert (half(x) - y).pow(2).mean() > 10 * (whole(x) - y).pow(2).mean()
    start = Projection(torch.eye(16), torch.zeros(16))
    parts = ((x[:1500], y[:1500]), (x[1500:], y[1500:]), lambda h: h @ head.T / 10)
    better = distil(start, *parts, 200, 0, torch.device("cpu"))
    before, after = (divergence(p, *parts[1], parts[2], "cpu") for p in (start, better))
    assert after < before
    assert distil(affine, *parts, 0, 0, torch.device("cpu")) is affine

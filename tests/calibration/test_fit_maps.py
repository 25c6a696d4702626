"""Projections are fitted, factored and distilled."""

import torch

from tide_compile.calibration.fit_maps import distil, divergence, factor, fit_affine
from tide_compile.calibration.statistics import Gram
from tide_compile.routers.networks import Projection


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

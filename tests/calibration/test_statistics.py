"""Sums and samples of states."""

import torch

from tide_compile.calibration.fit_maps import fit_affine
from tide_compile.calibration.statistics import Gram, Reservoir


def test_ridge_finds_a_linear_map():
    """Catches a transposed map or a lost bias; in directions without data it must stay the identity."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(8, 8, generator=generator), torch.randn(8, generator=generator)
    gram = Gram(8, torch.device("cpu"))
    for _ in range(20):
        x = torch.randn(50, 8, generator=generator) + 2
        gram.add(x, x @ weight.T + bias)
    found = fit_affine(gram, x, x @ weight.T + bias)
    assert torch.allclose(found[0], weight, atol=1e-2) and torch.allclose(found[1], bias, atol=1e-1)
    poor = Gram(8, torch.device("cpu"))
    x[:, 4:] = 0
    poor.add(x, x @ weight.T)
    assert torch.allclose(poor.ridge(0.1)[0][:, 4:], torch.eye(8)[:, 4:], atol=1e-3)


def test_reservoir_is_uniform():
    """Every tenth of the stream is equally likely to be kept (60 draws of 100; five sigma)."""
    counts = torch.zeros(10)
    for seed in range(60):
        reservoir, dice = Reservoir(100, 1, 1, torch.float32), torch.Generator().manual_seed(seed)
        for chunk in torch.arange(1000.0).view(-1, 1, 1).split(37):
            reservoir.add(chunk, dice)
        counts += torch.histc(reservoir.at(0), 10, 0, 1000)
    assert (counts - 600).abs().max() < 5 * 600**0.5

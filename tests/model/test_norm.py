"""Norms are recognised by what they compute."""

import pytest
import torch
from torch import nn

from tide_compile.model.norm import fit_norm_maybe


@pytest.mark.parametrize(
    ("module", "layer_norm", "bias"),
    [(nn.RMSNorm(64, eps=1e-5), False, False), (nn.LayerNorm(64, eps=1e-6), True, True)],
)
def test_norms_are_recognised(module, layer_norm, bias):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.rand(64, generator=generator) + 0.5
    norm = fit_norm_maybe(module, 64, torch.float32, torch.device("cpu"))
    assert norm.layer_norm == layer_norm and (norm.bias is not None) == bias
    assert torch.allclose(norm.weight, module.weight, atol=1e-3)
    assert norm.eps == pytest.approx(module.eps, rel=0.2)


def test_what_is_no_norm():
    assert fit_norm_maybe(nn.Tanh(), 64, torch.float32, torch.device("cpu")) is None

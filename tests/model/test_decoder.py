"""Layers, norm and head are found in every architecture."""

import pytest
import torch
from torch import nn

from tests.support.models import CONFIGS, HIDDEN, LAYERS, prompt, tiny
from tide_compile.errors import LayersNotFoundError
from tide_compile.kernels.route import normalise_reference
from tide_compile.model.decoder import find_decoder


@pytest.mark.parametrize("name", CONFIGS)
def test_decoder_is_found(name):
    """Layers, norm and head of every architecture: the head must repeat the model's own logits."""
    model = tiny(name)
    decoder = find_decoder(model)
    assert len(decoder.layers) == LAYERS and decoder.hidden_dim == HIDDEN
    states = {}
    ids, _ = prompt(1)
    with torch.no_grad(), decoder.on_layers(lambda i, _, h: states.__setitem__(i, h)):
        want = model(ids).logits
    assert torch.allclose(decoder.logits(states[LAYERS - 1][0]), want[0], atol=1e-6)
    norm = decoder.final_norm()
    h = torch.randn(5, HIDDEN)
    ours = normalise_reference(h, norm.weight, norm.bias, norm.eps, norm.layer_norm)
    assert torch.allclose(ours, decoder.norm(h), atol=1e-4)


def test_decoder_not_found():
    with pytest.raises(LayersNotFoundError):
        find_decoder(nn.Sequential(nn.Linear(4, 4)))

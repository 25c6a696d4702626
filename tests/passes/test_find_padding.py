"""The user's mask is found, or asked for."""

import pytest
import torch

from tests.support.graphs import capture, passes, settings
from tests.support.models import prompt, tiny
from tide_compile.errors import PaddingError


def test_mask_under_another_name():
    """Catches padding that is counted as text where a graph has a mask, but not the user's."""
    model = tiny("rmsnorm-rope-gqa")
    causal = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    (gm,) = capture(lambda ids, bias: model(ids, attention_mask=bias, use_cache=False), prompt(2)[0], causal)
    with pytest.raises(PaddingError, match="graph break"):
        passes(gm, settings())

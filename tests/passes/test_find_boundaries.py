"""One hidden state between two layers, and nothing else that skipped layers would have to give."""

import pytest
import torch

from tests.families.configs import build
from tests.support.graphs import Stack, capture, passes, settings
from tests.support.models import prompt
from tide_compile.errors import BoundaryNotUniqueError


def test_shared_keys_and_values_are_carried():
    """Later layers read keys and values of earlier ones: computed for skipped layers too."""
    (gm,) = capture(build("gemma4_text"), prompt(2)[0], use_cache=False)
    program, _ = passes(gm, settings((0, 1)))
    assert len(program.segments[0].fill.outputs) >= 2


def test_hidden_state_that_is_overwritten():
    """A layer that adds in place destroys the state that a skipped token keeps."""
    model = Stack()
    model.layers[2].forward = lambda x: x.add_(1)
    (gm,) = capture(model, torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(BoundaryNotUniqueError, match=r"layer 2 .* overwrites"):
        passes(gm, settings())


def test_boundary_that_can_be_bypassed():
    """A connection from layer 0 to layer 3 would still be read when layers 1 and 2 are skipped."""
    (gm,) = capture(Stack("skip"), torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(BoundaryNotUniqueError, match="after layer 1"):
        passes(gm, settings())

"""Where checkpoints may be, and the segments between them."""

import pytest
import torch

from tests.support.models import HIDDEN
from tide_compile import RouterBank, TIDEConfig
from tide_compile.errors import CheckpointError
from tide_compile.passes.place_checkpoints import checkpoint_layers, segment_cuts
from tide_compile.routers.settings import settings_of_bank


@pytest.mark.parametrize(
    ("n", "interval", "minimum", "cuts", "checkpoints"),
    [
        (32, 4, 8, range(3, 31, 4), (7, 11, 15, 19, 23, 27)),
        (30, 4, 8, range(1, 29, 2), (7, 11, 15, 19, 23, 27)),
        (31, 4, 30, range(3, 30, 4), ()),
        (6, 1, 1, range(5), (0, 1, 2, 3, 4)),
    ],
)
def test_checkpoints(n, interval, minimum, cuts, checkpoints):
    """Never after the last layer, at least min_layers deep, on the interval; cuts make equal segments."""
    found = checkpoint_layers(n, interval, minimum)
    assert found == checkpoints and segment_cuts(n, found, interval) == tuple(cuts)


def test_routers_where_no_checkpoint_is_permitted():
    bank = RouterBank.untrained(HIDDEN, 31, bottleneck_dim=16)
    config = TIDEConfig(checkpoint_interval=4, min_layers=30, exit_threshold=0.5)
    with pytest.raises(CheckpointError, match="min_layers=30"):
        settings_of_bank(bank, config, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("n", "checkpoints", "length"), [(30, (19, 21, 23), 2), (30, (9, 19), 10), (11, (7,), 8), (30, (9,), 10)]
)
def test_segments_between_chosen_checkpoints(n, checkpoints, length):
    """Checkpoints that came with the routers: as few segments as end behind all of them."""
    cuts = segment_cuts(n, checkpoints)
    assert set(checkpoints) <= set(cuts) and cuts[0] + 1 == length

"""place_checkpoints: after which layers segments end, and which of these cuts carry a router."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.fx import GraphModule

from tide_compile.passes.errors import CheckpointError
from tide_compile.passes.plan import Plan


def place_checkpoints(gm: GraphModule, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Cut the layers into segments, so that one ends behind each checkpoint of the settings (``segment_cuts``).

    Raises:
        CheckpointError: the routers are for another number of layers.
    """
    settings, count = plan.settings, len(plan.layers)
    if settings.expected_layers not in (None, count):
        raise CheckpointError(
            f"the routers are for a model of {settings.expected_layers} layers and this one has {count}. "
            "Calibrate this model."
        )
    cuts = segment_cuts(count, settings.checkpoints, settings.segment_length)
    return {"cuts": cuts, "checkpoints": settings.checkpoints}


def checkpoint_layers(num_layers: int, interval: int, min_layers: int) -> tuple[int, ...]:
    """Where checkpoints may be: behind every ``interval``-th layer, at least ``min_layers`` deep, never behind the last
    layer, where nothing is left to skip. Layers are numbered from 0, ascending."""
    return tuple(layer for layer in range(interval - 1, num_layers - 1, interval) if layer + 1 >= min_layers)


def segment_cuts(num_layers: int, checkpoints: Sequence[int], length: int | None = None) -> tuple[int, ...]:
    """The layers behind which segments end, ascending: equal segments, which are compiled once.

    Args:
        checkpoints: layers at which a segment has to end. length: layers of a segment, of which the number of layers
            down to each checkpoint is a multiple; None: the largest such number. Segments are shorter where that
            leaves no remainder at the end (30 layers, 4 to a segment: 2).
    """
    length = math.gcd(length or 0, *(layer + 1 for layer in checkpoints)) or num_layers
    shared = math.gcd(length, num_layers % length)
    length = shared if shared > 1 else length
    return tuple(range(length - 1, num_layers - 1, length))

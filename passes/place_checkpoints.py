"""place_checkpoints: after which layers segments end, and which of these cuts carry a router."""

from __future__ import annotations

import math

from tide_compile.passes.errors import CheckpointError
from tide_compile.passes.plan import Plan, Settings
from torch.fx import GraphModule


def place_checkpoints(gm: GraphModule, plan: Plan) -> dict[str, tuple[int, ...]]:
    """See ``checkpoint_layers``.

    Raises:
        CheckpointError: the routers are for another number of layers, or none falls on a permitted layer.
    """
    expected = plan.settings.expected_layers
    if expected not in (None, len(plan.layers)):
        raise CheckpointError(
            f"the routers are for a model of {expected} layers and this one has {len(plan.layers)}. "
            "Calibrate this model."
        )
    cuts, checkpoints = checkpoint_layers(len(plan.layers), plan.settings)
    return {"cuts": cuts, "checkpoints": checkpoints}


def checkpoint_layers(num_layers: int, settings: Settings) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cut the layers into equal segments; every ``checkpoint_interval`` layers, at least ``min_layers`` deep, a cut for
    which there is a router is a checkpoint.

    A segment is as long as the interval, or shorter where that leaves no remainder at the end (30 layers, interval 4:
    2): equal segments are compiled once. There is never a cut after the last layer: nothing is left to skip. Without
    any router in the settings the model is cut and runs in full.

    Returns:
        ``(cuts, checkpoints)``, layer numbers in ascending order; checkpoints are a subset of cuts.

    Raises:
        CheckpointError: there are routers, but none falls on a permitted layer.
    """
    interval = settings.checkpoint_interval
    shared = math.gcd(interval, num_layers % interval)
    length = shared if shared > 1 else interval
    grid = range(interval - 1, num_layers - 1, interval)
    permitted = [c for c in grid if c + 1 >= settings.min_layers]
    checkpoints = tuple(c for c in permitted if c in settings.routers)
    if settings.routers and not checkpoints:
        raise CheckpointError(
            f"no checkpoint can be placed: min_layers={settings.min_layers} and checkpoint_interval={interval} permit "
            f"exits after layers {permitted} of {num_layers}, the routers are for layers {sorted(settings.routers)}. "
            "Change these options, or calibrate again with them."
        )
    return tuple(range(length - 1, num_layers - 1, length)), checkpoints

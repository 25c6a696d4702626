"""place_checkpoints: after which layers segments end, and which of these cuts carry a router."""

from __future__ import annotations

from tide_compile.passes.errors import CheckpointError
from tide_compile.passes.plan import Plan, Settings
from torch.fx import GraphModule


def place_checkpoints(gm: GraphModule, plan: Plan) -> dict[str, tuple[int, ...]]:
    """See ``checkpoint_layers``; the graph itself does not matter."""
    cuts, checkpoints = checkpoint_layers(len(plan.layers), plan.settings)
    return {"cuts": cuts, "checkpoints": checkpoints}


def checkpoint_layers(num_layers: int, settings: Settings) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cut every ``checkpoint_interval`` layers; a cut at least ``min_layers`` deep with a router is a checkpoint.

    There is never a cut after the last layer: nothing is left to skip. Cuts without a router only make segments
    alike, so that one compiled segment serves several. Without any router in the settings the model is cut and runs
    in full.

    Returns:
        ``(cuts, checkpoints)``, layer numbers in ascending order; checkpoints are a subset of cuts.

    Raises:
        CheckpointError: there are routers, but none falls on a permitted layer.
    """
    grid = range(settings.checkpoint_interval - 1, num_layers - 1, settings.checkpoint_interval)
    permitted = [c for c in grid if c + 1 >= settings.min_layers]
    checkpoints = tuple(c for c in permitted if c in settings.routers)
    if settings.routers and not checkpoints:
        raise CheckpointError(
            f"no checkpoint can be placed: min_layers={settings.min_layers} and checkpoint_interval="
            f"{settings.checkpoint_interval} permit exits after layers {permitted} of {num_layers}, the routers are for "
            f"layers {sorted(settings.routers)}. Change these options, or calibrate again with them."
        )
    return tuple(grid), checkpoints

"""settings: from a config and a bank to what the passes are asked for. Where checkpoints are is decided here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from tide_compile.config import DEFAULT_THRESHOLD, TIDEConfig
from tide_compile.errors import CheckpointError, ConfigError, NoRouterError, RouterFileError
from tide_compile.passes.place_checkpoints import checkpoint_layers
from tide_compile.passes.plan import Settings
from tide_compile.routers.bank import RouterBank
from tide_compile.routers.lookup import find_bank
from tide_compile.routers.networks import Projection

_PLACES = {"min_layers": 8, "checkpoint_interval": 4}
_IN_MODEL_DTYPE = ("first", "second", "second_bias")


def settings_of(config: TIDEConfig, router: str | Path | RouterBank | None, inputs: Sequence[object]) -> Settings:
    """The settings for a graph with these inputs: the config, and the routers of the model that its parameters are of.

    Raises:
        NoRouterError, RouterMismatchError, RouterFileError, ConfigError: about the routers, see ``find_bank``.
        CheckpointError: no router is where the config permits a checkpoint.
    """
    if config.exit_threshold == 1:
        return settings_without_exits(config)
    parameters = [x for x in inputs if isinstance(x, nn.Parameter)]
    floating = next(p for p in parameters if p.is_floating_point())
    return settings_of_bank(find_bank(router, parameters), config, floating.device, floating.dtype)


def settings_without_exits(config: TIDEConfig) -> Settings:
    """The model is cut as it would be for checkpoints, and runs in full."""
    strategy = "propagate" if config.kv_cache_strategy == "auto" else config.kv_cache_strategy
    return Settings((), strategy, placed(config).checkpoint_interval, compaction=config.compaction)


def settings_of_bank(bank: RouterBank, config: TIDEConfig, device: torch.device, dtype: torch.dtype) -> Settings:
    """The bank's tensors on ``device``, with a config, as the settings that the passes take.

    ``dtype`` is the model's: projections and the probe's map are multiplied in it. The rest of a router stays in fp32.

    Raises:
        ConfigError: the config asks for projections or shortcuts that the bank does not have.
        NoRouterError: the bank is empty.
        RouterFileError: it lacks a part.
        CheckpointError: none of its routers is where the config permits a checkpoint.
    """
    projects, leads_on = _projects(bank, config), _leads_on(bank, config)
    thresholds = _thresholds(bank, config)
    checkpoints, segment_length = _checkpoints(bank, config, thresholds)
    shortcuts = _shortcuts(bank, checkpoints) if leads_on else {}
    missing = sorted(set(checkpoints) - set(bank.projections)) if projects else []
    if missing:
        raise RouterFileError(f"these routers lack the exit projections of layers {missing}. Calibrate again.")

    def in_dtype(projection: Iterable[Tensor | None]) -> dict[str, Tensor]:
        return {n: t.to(device, dtype) for n, t in Projection(*projection).tensors.items()}

    strategy = "propagate" if config.kv_cache_strategy == "auto" else config.kv_cache_strategy
    return Settings(
        checkpoints,
        "shortcut" if shortcuts else strategy,
        segment_length,
        routers={n: _router_tensors(bank, n, thresholds[n], device, dtype) for n in checkpoints},
        norm_weight=bank.norm.weight.to(device),
        norm_bias=None if bank.norm.bias is None else bank.norm.bias.to(device),
        norm_eps=bank.norm.eps,
        layer_norm=bank.norm.layer_norm,
        projections={n: in_dtype(bank.projections[n]) for n in checkpoints} if projects else None,
        shortcuts={n: in_dtype(shortcut) for n, shortcut in shortcuts.items()},
        expected_layers=bank.num_layers,
        compaction=config.compaction,
    )


def placed(config: TIDEConfig, calibrated: Mapping[str, object] = MappingProxyType({})) -> TIDEConfig:
    """A config with numbers for ``min_layers`` and ``checkpoint_interval``: where it leaves them open, those of the
    config that routers were ``calibrated`` with, or the defaults."""
    left_open = {name: default for name, default in _PLACES.items() if getattr(config, name) is None}
    return replace(config, **{name: calibrated.get(name) or default for name, default in left_open.items()})


def _projects(bank: RouterBank, config: TIDEConfig) -> bool:
    """Whether exited states go through the bank's projections."""
    if config.exit_strategy not in ("auto", "identity", bank.exit_strategy):
        raise ConfigError(
            f"exit_strategy={config.exit_strategy!r} needs projections of this kind, and these routers have "
            f"{bank.exit_strategy!r}: calibrate with exit_strategy={config.exit_strategy!r}."
        )
    return bool(bank.projections) and config.exit_strategy != "identity"


def _leads_on(bank: RouterBank, config: TIDEConfig) -> bool:
    """Whether the bank's shortcuts lead the states of tokens that have left past the layers they skip."""
    if config.kv_cache_strategy == "shortcut" and not bank.shortcuts:
        raise ConfigError(
            "kv_cache_strategy='shortcut' needs shortcuts, and these routers have none: calibrate again, or choose "
            "'propagate'."
        )
    return bool(bank.shortcuts) and config.kv_cache_strategy in ("auto", "shortcut")


def _thresholds(bank: RouterBank, config: TIDEConfig) -> dict[int, float]:
    """Layer -> threshold of the routers that somebody can leave at."""
    if not bank.routers:
        raise NoRouterError("this bank holds no routers. Calibrate, or pass exit_threshold=1.0 to run without exits.")
    if config.exit_threshold is None and bank.thresholds:
        chosen = bank.thresholds
    else:
        threshold = DEFAULT_THRESHOLD if config.exit_threshold is None else config.exit_threshold
        chosen = dict.fromkeys(bank.layers, threshold)
    return {layer: value for layer, value in sorted(chosen.items()) if value < 1}


def _checkpoints(
    bank: RouterBank, config: TIDEConfig, thresholds: Mapping[int, float]
) -> tuple[tuple[int, ...], int | None]:
    """The layers behind which somebody can leave, and the length of segments, None where the checkpoints tell it.

    Thresholds that came with the routers are for the checkpoints that they name. All others hold where the config
    permits a checkpoint and there is a router.
    """
    chosen = config.exit_threshold is None and bool(bank.thresholds)
    config = placed(config, bank.metadata.get("config", {}))
    interval, minimum = config.checkpoint_interval, config.min_layers
    permitted = range(bank.num_layers - 1) if chosen else checkpoint_layers(bank.num_layers, interval, minimum)
    checkpoints = tuple(layer for layer in permitted if layer in thresholds)
    if thresholds and not checkpoints:
        if chosen:
            raise CheckpointError(
                f"no checkpoint can be placed: the routers' thresholds are for layers {list(thresholds)}, and exits "
                f"are possible after layers 0 to {bank.num_layers - 2}. Calibrate again."
            )
        raise CheckpointError(
            f"no checkpoint can be placed: min_layers={minimum} and checkpoint_interval={interval} permit exits after "
            f"layers {list(permitted)} of {bank.num_layers}, the routers are for layers {list(thresholds)}. Change "
            "these options, or calibrate again with them."
        )
    return checkpoints, None if chosen and checkpoints else interval


def _router_tensors(
    bank: RouterBank, layer: int, threshold: float, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    tensors = bank.routers[layer].tensors.items()
    moved = {n: t.to(device, dtype if n in _IN_MODEL_DTYPE else None) for n, t in tensors}
    return {"threshold": torch.tensor(threshold, dtype=torch.float32, device=device), **moved}


def _shortcuts(bank: RouterBank, checkpoints: Sequence[int]) -> dict[int, Projection]:
    """Those that tokens which leave at these checkpoints need."""
    needed = range(min(checkpoints, default=bank.num_layers) + 1, bank.num_layers - 1)
    missing = sorted(set(needed) - set(bank.shortcuts))
    if missing:
        raise RouterFileError(f"these routers lack the shortcuts of layers {missing}. Calibrate again.")
    return {layer: bank.shortcuts[layer] for layer in needed}

"""autotune: a short list of launch configurations per kernel, pruned by size, of which the fastest is found once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import triton

from tide_compile.torch_internals.switches import autotunes

INTERPRETED = triton.knobs.runtime.interpret  # what triton.jit saw: the decorator looks at it once, at import
FIXED = INTERPRETED or not autotunes()


def tuned(
    configs: Sequence[triton.Config], key: Sequence[str], fits: Callable[[triton.Config, Mapping[str, object]], bool]
) -> Callable[[object], triton.runtime.Autotuner]:
    """Decorator: ``triton.autotune`` among the configurations that fit the sizes of a launch.

    Under the interpreter, and with ``TIDE_AUTOTUNE=0``, it is the first that fits, and nothing is measured.

    Args:
        configs: in order of preference.
        key: arguments of the kernel; a new value is measured anew.
        fits: says from a configuration and the launch's arguments by name whether to try it. Must not depend on the
            number of rows: that may be symbolic while a graph is traced.
    """

    def prune(configs: list[triton.Config], named: Mapping[str, object], **others: object) -> list[triton.Config]:
        return fitting(configs, {**named, **others}, fits)[: 1 if FIXED else None]

    def decorate(kernel: object) -> triton.runtime.Autotuner:
        found = triton.autotune(
            list(configs), key=list(key), prune_configs_by={"early_config_prune": prune}, cache_results=True
        )(kernel)
        found.fits = fits
        return found

    return decorate


def fitting(
    configs: Sequence[triton.Config],
    sizes: Mapping[str, object],
    fits: Callable[[triton.Config, Mapping[str, object]], bool],
) -> list[triton.Config]:
    """The configurations to try for these sizes; never none."""
    return [c for c in configs if fits(c, sizes)] or list(configs[:1])

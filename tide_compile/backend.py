"""backend="tide": options -> routers -> passes -> lowering -> executor."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.fx import GraphModule

from tide_compile.config import TIDEConfig
from tide_compile.errors import GradEnabledError, GraphError, NothingToSkipError, TideError, WeightsInGraphError
from tide_compile.inspection.observer import CompileObserver
from tide_compile.lowering import prewarm
from tide_compile.lowering.compile_piece import compile_whole
from tide_compile.lowering.lower import lower
from tide_compile.passes.run import run
from tide_compile.routers.lookup import version_of
from tide_compile.routers.settings import settings_of
from tide_compile.runtime.bindings import RouterBindings
from tide_compile.runtime.compaction_policy import CompactionPolicy
from tide_compile.runtime.executor import Executor

log = logging.getLogger("tide_compile")
prewarm.begin()  # this module is imported when torch.compile looks its backend up, before anything is traced


def tide_backend(
    gm: GraphModule,
    example_inputs: Sequence[object],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Callable[..., tuple]:
    """Compile one Dynamo graph of a decoder so that finished tokens skip layers.

    Args:
        gm: the graph. example_inputs: its inputs; parameters are the model's own objects.
        mode: Inductor's mode; torch.compile takes either ``mode`` or ``options``, so it is an option as well.
        options: ``router`` (a path or a ``RouterBank``), ``mode``, ``dump`` (a folder, see ``tide_compile.dump``), and
            the fields of ``TIDEConfig``.

    Raises:
        TideError: one of the named errors of ``tide_compile.errors``. With ``options={"fallback": "inductor"}`` graphs
            that cannot be cut are compiled without exits instead, and that is logged.
    """
    options = dict(options or {})
    router, mode = options.pop("router", None), options.pop("mode", mode)
    dump = options.pop("dump", None)
    config = TIDEConfig.from_options(options)
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        raise GradEnabledError(
            "the model was traced with gradients enabled, and exits are for inference only. Call it under "
            "torch.no_grad() or torch.inference_mode()."
        )
    settings_for = functools.partial(settings_of, config, router)
    observer = CompileObserver(dump)
    try:
        _check_weights(gm)
        program, plan = run(gm, functools.partial(settings_for, example_inputs), observer)
    except NothingToSkipError as error:
        observer.failed(error)
        log.warning("a graph of %d nodes without decoder layers is compiled as it is", len(gm.graph.nodes))
        return gm if config.lowering == "eager" else compile_whole(gm, example_inputs, mode)
    except TideError as error:
        observer.failed(error)
        if not isinstance(error, GraphError) or config.fallback is None:
            raise
        log.warning("TIDE is off for this graph, plain Inductor is used: %s", error)
        return compile_whole(gm, example_inputs, mode)
    observer.planned(program, plan)
    runnables = lower(program, config, mode, observer.compiled if observer.dumps else None)
    version = functools.partial(version_of, router)
    bindings = RouterBindings(program.constants, plan, example_inputs, settings_for, version)
    return Executor(program, plan, runnables, CompactionPolicy(program, plan, config), bindings)


def _check_weights(gm: GraphModule) -> None:
    inside = next((name for name, _ in gm.named_parameters()), None)
    if inside is not None:
        raise WeightsInGraphError(
            f"{inside} is a part of the traced graph and not one of its inputs, where routers look for a model. "
            "Inductor's freezing (torch._inductor.config.freezing, TORCHINDUCTOR_FREEZING=1) does so, and "
            "torch._dynamo.config.inline_inbuilt_nn_modules=False: switch them back. pack_weights=True packs weights."
        )

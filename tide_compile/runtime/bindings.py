"""bindings: which routers' tensors compiled code is run with, for the model that a call brings."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from tide_compile.errors import RouterMismatchError
from tide_compile.passes.plan import Plan, Settings


class RouterBindings:
    """Tensors of routers by model, held weakly.

    Dynamo runs the code of one model for any other of the same shape, and for the same model when it has got new
    routers. So routers are looked up again for a model that was not seen before (by the identity of three of its
    parameters), and when their version changes.

    Args:
        constants: the tensors that the program was built with, by name.
        plan: the plan it was built from.
        example_inputs: of the graph; the routers in ``constants`` belong to the model they come from.
        settings_for: finds the settings for the inputs of another model.
        version: of the routers; looked at on every call.
    """

    def __init__(
        self,
        constants: Mapping[str, torch.Tensor],
        plan: Plan,
        example_inputs: Sequence[object],
        settings_for: Callable[[Sequence[object]], Settings],
        version: Callable[[], object],
    ) -> None:
        self._plan, self._settings_for = plan, settings_for
        self._kinds = _kinds_of(constants)
        parameters = [i for i, x in enumerate(example_inputs) if isinstance(x, nn.Parameter)]
        self._anchors = [parameters[i] for i in {0, len(parameters) // 2, len(parameters) - 1}] if parameters else []
        self._version_of, self._version = version, version()
        self._bound: list[tuple[list[weakref.ref], tuple[torch.Tensor, ...]]] = []
        self._bind(example_inputs, constants)

    def __call__(self, arguments: Sequence[object]) -> tuple[torch.Tensor, ...]:
        """The tensors for a call with these arguments, in the order of the program's constants.

        Raises:
            RouterMismatchError: this model has routers that the code was not compiled for.
        """
        if not self._kinds:
            return ()
        version = self._version_of()
        if version not in (None, self._version):
            self._bound, self._version = [], version
        for references, tensors in self._bound:
            if all(ref() is arguments[i] for ref, i in zip(references, self._anchors, strict=True)):
                return tensors
        return self._bind(arguments, self._looked_up(arguments))

    def _looked_up(self, arguments: Sequence[object]) -> Mapping[str, torch.Tensor]:
        settings, compiled = self._settings_for(arguments), self._plan.settings
        layers = [layer for layer in self._plan.checkpoints if layer in settings.routers]
        found = {name: tensor for layer in layers for name, tensor in settings.constants(layer).items()}
        found |= settings.shortcut_constants()
        alike = (settings.norm_eps, settings.layer_norm) == (compiled.norm_eps, compiled.layer_norm)
        if not alike or _kinds_of(found) != self._kinds:
            raise RouterMismatchError(
                f"this code was compiled for routers after layers {list(self._plan.checkpoints)}, and now there are "
                f"others (after layers {sorted(settings.routers)}, or of another size or norm) for this model or "
                "another of the same shape. Compile each with its own options={'router': ...}, or call "
                "torch._dynamo.reset()."
            )
        return found

    def _bind(self, arguments: Sequence[object], constants: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        tensors = tuple(constants[name] for name in self._kinds)
        self._bound.append(([weakref.ref(arguments[i]) for i in self._anchors], tensors))
        return tensors


def _kinds_of(constants: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in constants.items()}

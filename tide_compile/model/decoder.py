"""decoder: the layers, the final norm and the head of a model, found by structure and by running one token.

Shapes: B batch, S sequence, H hidden, V vocabulary, N layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tide_compile.errors import LayersNotFoundError, PaddingError
from tide_compile.model.norm import Norm, fit_norm_maybe
from tide_compile.passes.find_padding import does_not_fit

LayerCallback = Callable[[int, Tensor, Tensor], Tensor | None]


@dataclass(frozen=True, slots=True)
class Decoder:
    """The parts of a causal language model that calibration and the reference need.

    Attributes:
        model: the model.
        path: name of the list of its layers in the model.
        layers: its N decoder layers.
        hidden_dim: H.
        norm: the module called first after the last layer, or None.
        output_lengths: per layer, 0 if it returns a tensor, else the length of the tuple it returns.
    """

    model: nn.Module
    path: str
    layers: tuple[nn.Module, ...]
    hidden_dim: int
    norm: nn.Module | None
    output_lengths: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """Of the model's first parameter, where token ids go."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @contextmanager
    def on_layers(self, callback: LayerCallback) -> Iterator[None]:
        """Call ``callback(layer, input [B, S, H], output [B, S, H])`` behind every layer inside the block; what it
        returns (unless None) replaces the output."""
        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                hook = _layer_hook(index, callback)
                stack.callback(layer.register_forward_hook(hook, prepend=True, with_kwargs=True).remove)
            yield

    def final_norm(self) -> Norm:
        """A copy of the final norm for the routers; plain RMSNorm where it is neither RMSNorm nor LayerNorm."""
        fitted = None if self.norm is None else fit_norm_maybe(self.norm, self.hidden_dim, self.dtype, self.device)
        return fitted or Norm(torch.ones(self.hidden_dim, dtype=torch.float32))

    def logits(self, states: Tensor) -> Tensor:
        """What the model would say if its last layer had returned ``states`` [T, H]: final norm, head, and whatever
        else its forward does after the layers. Returns [T, V]."""
        ids = torch.zeros(len(states), 1, dtype=torch.long, device=states.device)
        rows = states.to(self.dtype).unsqueeze(1)
        with ExitStack() as stack:
            for layer, length in zip(self.layers, self.output_lengths, strict=True):
                result = (rows, *[None] * (length - 1)) if length else rows
                stack.enter_context(_replaced_forward(layer, result))
            return self.model.forward(input_ids=ids, use_cache=False).logits.squeeze(1)


@torch.no_grad()
def find_decoder(model: nn.Module) -> Decoder:
    """Run one token through a causal language model and see which list of modules is its decoder: of the lists of which
    two or more members run, the one that holds most parameters. Each of these must run once and return a [B, S, H]
    state; others (cross attention without an image) are no layers of this model.

    Raises:
        LayersNotFoundError: there is no such list.
    """
    lists = {n: tuple(m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
    if not lists:
        raise LayersNotFoundError(
            f"{type(model).__name__} holds no list of decoder layers. Pass the causal language model itself."
        )
    runs = _runs_of_one_token(model, {layer for members in lists.values() for layer in members})
    returned: dict[nn.Module, list[object]] = {}
    for run in runs:
        returned.setdefault(run.module, []).append(run.output)
    running = {n: tuple(layer for layer in members if layer in returned) for n, members in lists.items()}
    path = _largest_maybe({n: members for n, members in running.items() if len(members) > 1})
    if path is None or not all(_is_layer(returned[layer]) for layer in running[path]):
        raise LayersNotFoundError(_why_not(model, lists, returned))
    layers = running[path]
    outputs = [returned[layer][0] for layer in layers]
    lengths = tuple(len(o) if isinstance(o, tuple | list) else 0 for o in outputs)
    state = _hidden(outputs[-1])
    return Decoder(model, path, layers, state.shape[-1], _norm_behind_maybe(layers[-1], state, runs), lengths)


class _Run(NamedTuple):
    """A module that has run: its first argument, if that is a tensor, and what it returned."""

    module: nn.Module
    entered: Tensor | None
    output: object


def _runs_of_one_token(model: nn.Module, watched: set[nn.Module]) -> list[_Run]:
    """Of every watched module and every leaf, in order of return."""
    runs = []

    def note(module: nn.Module, args: tuple, output: object) -> None:
        runs.append(_Run(module, args[0] if args and isinstance(args[0], Tensor) else None, output))

    with ExitStack() as stack:
        for module in model.modules():
            if module in watched or not any(True for _ in module.children()):
                stack.callback(module.register_forward_hook(note).remove)
        ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        model.forward(input_ids=ids, use_cache=False)
    return runs


def _largest_maybe(lists: Mapping[str, tuple[nn.Module, ...]]) -> str | None:
    """The name of the list with most parameters, of those that lie in no other."""
    outer = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    return max(outer, key=lambda n: sum(p.numel() for module in lists[n] for p in module.parameters()), default=None)


def _norm_behind_maybe(last: nn.Module, state: Tensor, runs: Sequence[_Run]) -> nn.Module | None:
    """The first module to run behind the last layer on a tensor of the shape of that layer's ``state``."""
    behind = runs[1 + next(i for i, run in enumerate(runs) if run.module is last) :]
    fits = (run.module for run in behind if run.entered is not None and run.entered.shape == state.shape)
    return next(fits, None)


def _why_not(model: nn.Module, lists: dict[str, tuple[nn.Module, ...]], returned: dict[nn.Module, list[object]]) -> str:
    name = type(model).__name__
    longest = max(lists, key=lambda n: (sum(layer in returned for layer in lists[n]), len(lists[n])))
    times = sorted({len(returned.get(layer, ())) for layer in lists[longest]} - {0}) or [0]
    if times != [1]:
        return (
            f"the {len(lists[longest])} members of {longest!r} of {name} run {' to '.join(map(str, times))} times for "
            "one token: exits need layers that run once each."
        )
    return (
        f"the members of {longest!r} of {name} do not hand on one hidden state [B, S, H], so exits are not possible "
        "between them."
    )


def _is_layer(results: list[object]) -> bool:
    state = _hidden(results[0])
    return len(results) == 1 and state is not None and state.dim() == 3 and state.shape[:2] == (1, 1)


def valid_tokens(attention_mask: Tensor | Mapping[str, Tensor] | None, rows: Tensor) -> Tensor:
    """Which tokens of a call are no padding: [B, S] bool, from a mask [B, L], [B, 1, S, L], or one per kind of
    attention, for hidden states ``rows`` [B, S, H].

    Raises:
        PaddingError: the mask does not fit.
    """
    if isinstance(attention_mask, Mapping):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values()), None))
    if attention_mask is None:
        return torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
    if attention_mask.dim() == 4 and attention_mask.shape[2] == 1 != rows.shape[1]:  # the same for all queries
        attention_mask = attention_mask[:, 0, 0]
        attention_mask = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
    if attention_mask.dim() == 2:
        message = does_not_fit(attention_mask.shape, rows.shape)
        if message:
            raise PaddingError(message)
        return attention_mask[:, -rows.shape[1] :].bool()
    visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
    return visible[:, 0].any(-1).expand(rows.shape[:2])


def call_arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, object]:
    """The arguments of a forward call by name."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    return {**bound.pop("kwargs", {}), **bound}


def _layer_hook(index: int, callback: LayerCallback) -> Callable[..., object]:
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
        entered = args[0] if args else kwargs["hidden_states"]
        changed = callback(index, entered, _hidden(output))
        if changed is None:
            return None
        return type(output)((changed, *output[1:])) if isinstance(output, tuple | list) else changed

    return hook


@contextmanager
def _replaced_forward(module: nn.Module, result: object) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: result
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _hidden(output: object) -> Tensor | None:
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None

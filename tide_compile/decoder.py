"""The decoder inside a model: its layers, its final norm and its head, found by structure and by running one token.

Shapes: B batch, S sequence, H hidden, V vocabulary, N layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tide_compile.errors import LayersNotFoundError
from tide_compile.norms import fit_norm_maybe
from tide_compile.routers import Norm

LayerCallback = Callable[[int, Tensor, Tensor], Tensor | None]


@dataclass(frozen=True, slots=True)
class Decoder:
    """The parts of a causal language model that calibration and the reference need.

    Attributes:
        model: the model.
        layers: its N decoder layers.
        hidden_dim: H.
        norm: the module called first after the last layer, or None.
        output_lengths: per layer, 0 if it returns a tensor, else the length of the tuple it returns.
    """

    model: nn.Module
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
                stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def final_norm(self) -> Norm:
        """A copy of the final norm for the routers; plain RMSNorm where it is neither RMSNorm nor LayerNorm."""
        fitted = None if self.norm is None else fit_norm_maybe(self.norm, self.hidden_dim, self.dtype, self.device)
        return fitted or Norm(torch.ones(self.hidden_dim))

    @torch.no_grad()
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


def find_layers_in(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The outermost list of modules with the most members: the decoder's layers.

    Raises:
        LayersNotFoundError: the model holds no list of two or more modules.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
    outer = {n: m for n, m in lists.items() if not any(n.startswith(f"{o}.") for o in lists)}
    if not outer:
        raise LayersNotFoundError(
            f"{type(model).__name__} holds no list of decoder layers. Pass the causal language model itself."
        )
    name = max(outer, key=lambda n: len(outer[n]))
    return name, outer[name]


@torch.no_grad()
def find_decoder(model: nn.Module) -> Decoder:
    """Find the decoder of a causal language model by its lists of modules, and run one token to see what its layers
    return and what is called after them.

    Raises:
        LayersNotFoundError: there is no list of layers, or they return no [B, S, H] state.
    """
    layers = tuple(find_layers_in(model)[1])
    outputs: dict[int, object] = {}
    after: list[nn.Module] = []
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(lambda m, a, out, i=index: outputs.__setitem__(i, out)).remove)
        inside = {m for layer in layers for m in layer.modules()}
        for module in model.modules():
            if module not in inside and not any(True for _ in module.children()):
                stack.callback(module.register_forward_hook(_note(after, outputs, len(layers))).remove)
        model.forward(
            input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device),
            use_cache=False,
        )
    states = [_hidden(outputs.get(i)) for i in range(len(layers))]
    if any(s is None or s.dim() != 3 for s in states):
        raise LayersNotFoundError(
            f"the members of the longest module list of {type(model).__name__} do not return a [B, S, H] hidden state, "
            "so they are not decoder layers."
        )
    lengths = tuple(len(outputs[i]) if isinstance(outputs[i], tuple) else 0 for i in range(len(layers)))
    return Decoder(model, layers, states[-1].shape[-1], after[0] if after else None, lengths)


def valid_tokens(attention_mask: Tensor | Mapping[str, Tensor] | None, rows: Tensor) -> Tensor:
    """Which tokens of a call are no padding: [B, S] bool, from a mask [B, L], [B, 1, S, L], or one per kind of
    attention, for hidden states ``rows`` [B, S, H]."""
    if isinstance(attention_mask, Mapping):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values()), None))
    if attention_mask is None:
        return torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
    if attention_mask.dim() == 2:
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
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def _note(after: list[nn.Module], outputs: dict[int, object], num_layers: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, output: object) -> None:
        last = _hidden(outputs.get(num_layers - 1))
        if (
            last is not None
            and args
            and isinstance(args[0], Tensor)
            and args[0].shape == last.shape
            and _hidden(output) is not None
        ):
            after.append(module)

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
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, Tensor) else None

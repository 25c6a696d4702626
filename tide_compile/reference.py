"""The eager reference: what every compiled mode must equal, as hooks on the decoder layers.

The loop, for a state h [B, S, H] behind layer l::

    h = where(exited, s_l(h_before), h)                # an exited token keeps its frozen state, s_l(h) = h, or, with
                                                       # shortcuts, is led on by them
    if l is a checkpoint:
        score = router_l(h);  leave = active & (score > threshold_l)
        out   = where(leave, project_l(h), out);  exited |= leave
    if l is the last layer: h = where(exited, out, h)
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tide_compile.config import TIDEConfig
from tide_compile.kernels.probe import PARTS, probe_reference
from tide_compile.kernels.project import project_reference
from tide_compile.kernels.route import route_reference
from tide_compile.model.decoder import Decoder, call_arguments, find_decoder, valid_tokens
from tide_compile.passes.plan import PADDING
from tide_compile.routers.bank import RouterBank
from tide_compile.routers.settings import settings_of_bank


class Reference:
    """State of the loop during a call. ``exit_layers`` gets, per call of the model, the [B, S] int64 layer that each
    token left after (N - 1: none, -1: padding); ``scores`` per call a dict layer -> [B, S] fp32."""

    def __init__(self, decoder: Decoder, bank: RouterBank, config: TIDEConfig) -> None:
        self.settings = settings_of_bank(bank, config, decoder.device, decoder.dtype)
        self.last = len(decoder.layers) - 1
        self.zero_pad = config.kv_cache_strategy == "zero_pad"
        self.exit_layers: list[Tensor] = []
        self.scores: list[dict[int, Tensor]] = []
        self.mask: object = None
        self.exited: Tensor | None = None
        self.frozen: Tensor | None = None

    def start(self, mask: object) -> None:
        self.mask, self.exited, self.frozen = mask, None, None

    def after_layer(self, layer: int, entered: Tensor, hidden: Tensor) -> Tensor:
        if layer == 0:
            self.valid = valid_tokens(self.mask, hidden)
            self.exited = self.frozen = torch.zeros_like(self.valid)
            self.out = torch.zeros_like(hidden)
            self.exit_layers.append(torch.where(self.valid, self.last, PADDING))
            self.scores.append({})
        hidden = torch.where(self.frozen.unsqueeze(-1), self.led_on(layer, entered), hidden)
        if layer in self.settings.checkpoints:
            self.decide(layer, hidden)
        return torch.where(self.exited.unsqueeze(-1), self.out, hidden) if layer == self.last else hidden

    def led_on(self, layer: int, state: Tensor) -> Tensor:
        tensors = self.settings.shortcuts.get(layer)
        if tensors is None:
            return state
        narrow = linear(state.to(tensors["down"].dtype), tensors["down"])
        return state + linear(narrow, tensors["weight"], tensors["bias"]).to(state.dtype)

    def decide(self, layer: int, hidden: Tensor) -> None:
        s = self.settings
        router = s.routers[layer]
        norm = (s.norm_weight, s.norm_bias)
        offset = None
        if PARTS[0] in router:
            offset = probe_reference(hidden, *norm, *(router[n] for n in PARTS), s.norm_eps, s.layer_norm)
        score, leave = route_reference(
            hidden, self.valid & ~self.exited, *norm, router["down"], router["up"],
            router["threshold"], s.norm_eps, s.layer_norm, offset,
        )  # fmt: skip
        if s.projections is None:
            self.out = torch.where(leave.unsqueeze(-1), hidden, self.out)
        else:
            self.out = project_reference(hidden, leave, self.out, **s.projections[layer])
        self.exited = self.exited | leave
        left = self.exited.any() and not (self.valid & ~self.exited).any()  # padding runs as long as any token does
        self.frozen = torch.ones_like(self.exited) if left else self.exited
        self.exit_layers[-1] = torch.where(leave, layer, self.exit_layers[-1])
        self.scores[-1][layer] = score


@contextmanager
def eager_reference(
    model: nn.Module, bank: RouterBank, config: TIDEConfig | None = None, decoder: Decoder | None = None
) -> Iterator[Reference]:
    """Run ``model`` with the meaning of TIDE, uncompiled, inside the block; its calls and ``generate`` all follow it.

    Args:
        model: a causal language model that is not compiled.
        bank: routers, used without a fingerprint check.
        config: as for the backend.
        decoder: saves finding it again.

    Yields:
        The loop's state: ``exit_layers`` (per call, [B, S] int64) and ``scores`` (per call, layer -> [B, S] fp32).

    Raises:
        LayersNotFoundError: the model has no decoder layers.
        ConfigError, NoRouterError, CheckpointError: config and bank do not fit each other.
        PaddingError: from a call, if its attention mask does not fit its tokens.
    """
    decoder = decoder or find_decoder(model)
    reference = Reference(decoder, bank, config or TIDEConfig())
    with ExitStack() as stack:
        stack.enter_context(decoder.on_layers(reference.after_layer))
        hook = model.register_forward_pre_hook(
            lambda m, a, k: reference.start(call_arguments(m, a, k).get("attention_mask")), with_kwargs=True
        )
        stack.callback(hook.remove)
        if reference.zero_pad:
            for layer in decoder.layers:
                stack.callback(layer.register_forward_pre_hook(_zeroing(reference), with_kwargs=True).remove)
        yield reference


def _zeroing(reference: Reference):
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if reference.frozen is None or not reference.frozen.any():
            return None
        arguments = call_arguments(module, args, kwargs)
        names = inspect.signature(module.forward).parameters
        name = next(n for n in names if n == "cache" or "past" in n)  # transformers 5.24 renamed it
        return (), {**arguments, name: _ZeroingCache(arguments.get(name), reference.frozen)}

    return hook


class _ZeroingCache:
    """A cache whose new K and V [B, heads, S, D] are zero for frozen tokens; without a cache behind it, it only hands
    them on to attention."""

    def __init__(self, cache: object, frozen: Tensor) -> None:
        self._cache, self._frozen = cache, frozen

    def update(self, keys: Tensor, values: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        rows = self._frozen[:, None, :, None]
        keys, values = torch.where(rows, 0, keys), torch.where(rows, 0, values)
        return (keys, values) if self._cache is None else self._cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> object:
        return getattr(self._cache, name)

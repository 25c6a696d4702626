"""static_cache: the caches that an engine keeps between calls, and which sizes are compiled for."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from tide_compile.kernels.few_rows import FEW_ROWS
from tide_compile.torch_internals.dynamo import mark_static, maybe_mark_dynamic

_SMALLEST = 256  # tokens; below that a longer cache costs nothing measurable and saves a recompilation


class KeptCache(NamedTuple):
    """``kind``: batch size, dtype, device and autocast of what it is for."""

    cache: StaticCache
    kind: tuple[object, ...]


class KeptCaches:
    """The static caches of a model: each ``generate`` has one to itself, which later ones use again.

    Kept are caches of the latest kind alone, as many as calls have had at once. Any thread may call this.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._kind: tuple[object, ...] | None = None
        self._free: list[StaticCache] = []
        self._lock = threading.Lock()

    def take(self, batch_size: int, max_cache_len: int) -> KeptCache:
        """An empty cache, until ``give_back``; a new one only for another kind or more tokens."""
        kind = (batch_size, self._model.dtype, self._model.device, _autocast_dtype(self._model.device.type))
        with self._lock:
            free = self._free if kind == self._kind else []
            fitting = next((cache for cache in free if cache.get_max_length() >= max_cache_len), None)
            self._kind = kind
            self._free = [cache for cache in free if cache is not fitting] if fitting else []
        if fitting is not None:
            fitting.reset()
            return KeptCache(fitting, kind)
        length = max(_SMALLEST, 1 << (max_cache_len - 1).bit_length())
        cache = new_static_cache(self._model, batch_size, length)
        if batch_size <= FEW_ROWS:
            for tensor in (x for layer in cache.layers for x in vars(layer).values() if _has_rows(x)):
                mark_static(tensor, 0)
        return KeptCache(cache, kind)

    def give_back(self, kept: KeptCache) -> None:
        """Nobody uses this one any more."""
        with self._lock:
            if kept.kind == self._kind:
                self._free.append(kept.cache)


def new_static_cache(model: PreTrainedModel, batch_size: int, length: int) -> StaticCache:
    """An empty cache for ``length`` tokens of each sequence, initialised where the model tells its shape. Autocast
    decides by itself on the dtypes of keys and of values: then the first of them are waited for."""
    shape = model._get_static_cache_init_shape()
    with torch.inference_mode(False):  # an inference tensor could not be reset outside of inference mode
        cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
        if shape is not None and _autocast_dtype(model.device.type) is None:
            first = next(p for p in model.parameters() if p.is_floating_point())
            cache.early_initialization(batch_size, *shape, dtype=first.dtype, device=first.device)
    return cache


def has_plain_layers(model: PreTrainedModel) -> bool:
    """Whether all layers of its static cache keep keys and values of all tokens, and nothing else."""
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=1)
    return all(type(layer) is StaticLayer for layer in cache.layers)


def dynamic_copy(cache: StaticCache, model: PreTrainedModel) -> DynamicCache:
    """What a static cache of plain layers holds, in the cache that ``generate`` makes by default."""
    copy = DynamicCache(config=model.config.get_text_config(decoder=True))
    for index, layer in enumerate(cache.layers):
        length = int(layer.get_seq_length())
        if length:
            copy.update(layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), index)
    return copy


def _autocast_dtype(device: str) -> torch.dtype | None:
    available = torch.amp.is_autocast_available(device)  # not so on "meta"
    return torch.get_autocast_dtype(device) if available and torch.is_autocast_enabled(device) else None


def mark_sizes(kwargs: dict[str, object]) -> None:
    """Compile prompts of all lengths as one dynamic shape from the first, not from the second on, and every small
    number of sequences for itself: products of few rows have forms that need it."""
    ids = kwargs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return
    masks = kwargs.get("attention_mask")
    for tensor in (ids, kwargs.get("position_ids"), *(masks.values() if isinstance(masks, dict) else (masks,))):
        if isinstance(tensor, Tensor):
            if len(ids) <= FEW_ROWS:
                mark_static(tensor, 0)
            if ids.shape[1] > 1:
                maybe_mark_dynamic(tensor, 2 if tensor.dim() == 4 else 1)


def _has_rows(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0

"""static_cache: the cache that an engine keeps between calls, and which sizes are compiled for."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from tide_compile.kernels.few_rows import FEW_ROWS
from tide_compile.torch_internals.dynamo import mark_static, maybe_mark_dynamic

_SMALLEST = 256  # tokens; below that a longer cache costs nothing measurable and saves a recompilation


class KeptCache:
    """One static cache of a model, made anew only for another batch size, dtype or device, or more tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache: StaticCache | None = None
        self._kind: tuple[object, ...] | None = None  # batch size, dtype, device

    def prepare(
        self, cache_implementation: str, batch_size: int, max_cache_len: int, *_: object, **__: object
    ) -> StaticCache:
        """In the place of transformers' ``_prepare_static_cache``, which makes a new cache for every ``generate``."""
        kind = (batch_size, self._model.dtype, self._model.device)
        if self._cache is not None and kind == self._kind and self._cache.get_max_length() >= max_cache_len:
            self._cache.reset()
            return self._cache
        length = max(_SMALLEST, 1 << (max_cache_len - 1).bit_length())
        self._cache, self._kind = new_static_cache(self._model, batch_size, length), kind
        if batch_size <= FEW_ROWS:
            for tensor in (x for layer in self._cache.layers for x in vars(layer).values() if _has_rows(x)):
                mark_static(tensor, 0)
        return self._cache

    def hand_over(self) -> None:
        """The cache belongs to somebody else from now on."""
        self._cache = None


def new_static_cache(model: PreTrainedModel, batch_size: int, length: int) -> StaticCache:
    """An empty cache for ``length`` tokens of each sequence, initialised where the model tells its shape."""
    shape = model._get_static_cache_init_shape()
    with torch.inference_mode(False):  # an inference tensor could not be reset outside of inference mode
        cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
        if shape is not None:
            first = next(p for p in model.parameters() if p.is_floating_point())
            cache.early_initialization(batch_size, *shape, dtype=first.dtype, device=first.device)
    return cache


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

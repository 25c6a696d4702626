"""FinishedRows: sequences that have ended do not hold the others of their batch at full depth.

``generate`` goes on feeding padding to them and says nothing of it to the model: the attention mask grows by a one.
Here the verdict of its stopping criteria is kept, and that last column becomes a zero, which makes them padding for
exits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import StoppingCriteriaList


class FinishedRows:
    """The forward of a model during ``generate`` (greedy search and sampling; beams change places).

    Args:
        model: whose ``generate`` it is; gets a ``_get_stopping_criteria`` of its own.
        call: the forward.
    """

    def __init__(self, model: PreTrainedModel, call: Callable[..., object]) -> None:
        self._model, self._call = model, call
        self._finished: Tensor | None = None  # [B] bool; all False when all have: then nobody is held up
        model._get_stopping_criteria = self._criteria

    def __call__(self, *args: object, **kwargs: object) -> object:
        mask = kwargs.get("attention_mask")
        if self._finished is not None and mask is not None:
            masks = {n: self._hide(m) for n, m in mask.items()} if isinstance(mask, dict) else self._hide(mask)
            kwargs["attention_mask"] = masks
        return self._call(*args, **kwargs)

    def note(self, finished: Tensor) -> None:
        """``finished``: [B] bool. Nothing of it is read here: that would wait for the device at every token."""
        if len(finished) > 1:
            finished = finished if self._finished is None else finished | self._finished
            self._finished = finished & ~finished.all()

    def _criteria(self, generation_config: GenerationConfig, *args: object, **kwargs: object) -> StoppingCriteriaList:
        self._finished = None
        criteria = type(self._model)._get_stopping_criteria(self._model, generation_config, *args, **kwargs)
        return criteria if (generation_config.num_beams or 1) > 1 else _Watched(criteria, self)

    def _hide(self, mask: Tensor | None) -> Tensor | None:
        """The last token is padding: a mask [B, L] gets a zero there, one of [B, 1, 1, L] lets it see nothing."""
        if mask is None or len(mask) != len(self._finished):
            return mask
        if mask.dim() == 4:
            nothing = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            return torch.where(self._finished[:, None, None, None], nothing, mask)
        return torch.cat([mask[:, :-1], mask[:, -1:] * ~self._finished[:, None]], dim=1)


class _Watched(StoppingCriteriaList):
    def __init__(self, criteria: StoppingCriteriaList, rows: FinishedRows) -> None:
        super().__init__(criteria)
        self._rows = rows

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        finished = super().__call__(*args, **kwargs)
        self._rows.note(finished)
        return finished

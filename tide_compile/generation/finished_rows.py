"""FinishedRows: sequences that have ended do not hold the others of their batch at full depth.

``generate`` goes on feeding padding to them and says nothing of it to the model: the attention mask grows by a one.
Here the verdict of its stopping criteria is kept, and that last column becomes a zero, which makes them padding for
exits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.generation import StoppingCriteriaList


class FinishedRows:
    """Of one ``generate`` by greedy search or sampling; beams change places."""

    def __init__(self) -> None:
        self._finished: Tensor | None = None  # [B] bool; all False when all have: then nobody is held up
        self._cache: object = None  # of the forwards of this ``generate``, as the first of them had it
        self._begun = False

    def watched(self, criteria: StoppingCriteriaList) -> StoppingCriteriaList:
        """Criteria like these, whose verdicts are noted."""
        return _Watched(criteria, self)

    def note(self, finished: Tensor) -> None:
        """``finished``: [B] bool. Nothing of it is read here: that would wait for the device at every token."""
        if len(finished) > 1:
            finished = finished if self._finished is None else finished | self._finished
            self._finished = finished & ~finished.all()

    def hidden(self, kwargs: dict[str, object]) -> dict[str, object]:
        """The arguments of a forward, with the last token of rows that have ended as padding. Forwards with another
        cache than the first one's are those of a callback."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # renamed in transformers 5.24
        if not self._begun:
            self._begun, self._cache = True, cache
        mask = kwargs.get("attention_mask")
        if self._finished is None or mask is None or cache is not self._cache:
            return kwargs
        masks = {n: self._hide(m) for n, m in mask.items()} if isinstance(mask, dict) else self._hide(mask)
        return {**kwargs, "attention_mask": masks}

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

"""axis: where the rows of a call are in a value, and where a view of it has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true


@dataclass(frozen=True, slots=True)
class Axis:
    """Where rows are: ``row`` is their dimension and ``batch`` that of the sequences they belong to; None when all
    sequences have the same rows. Both are equal where a view has merged them to [B * S]."""

    row: int
    batch: int | None = None

    def moved(self, where: Callable[[int], int]) -> Axis:
        """The same rows in a value whose dimension ``where(d)`` is this one's dimension ``d``."""
        return Axis(where(self.row), None if self.batch is None else where(self.batch))

    @property
    def dims(self) -> set[int]:
        """The dimensions that tell rows apart."""
        return {self.row} | ({self.batch} - {None})


def axis_after_view(before: torch.Size, after: torch.Size, axis: Axis) -> Axis | None:
    """Where rows are after a view: at the dimension of their size that has as many elements in front of it."""
    if axis.batch is None:
        row = _same_place(before, after, axis.row)
        return None if row is None else Axis(row)
    batch = _same_place(before, after, axis.batch)
    if axis.batch != axis.row:
        row = _same_place(before, after, axis.row)
        if row is not None and batch is not None:
            return Axis(row, batch)
        if axis.row == axis.batch + 1:  # [B, S] -> [B * S]
            merged = (*before[: axis.batch], before[axis.batch] * before[axis.row], *before[axis.row + 1 :])
            place = _same_place(merged, after, axis.batch)
            return None if place is None else Axis(place, place)
        return None
    if batch is not None:
        return Axis(batch, batch)
    for place in range(len(after) - 1):  # [B * S] -> [B, S]
        merged = (*after[:place], after[place] * after[place + 1], *after[place + 2 :])
        if _same_place(before, merged, axis.row) == place and not _is_one(after[place + 1]):
            return Axis(place + 1, place)
    return None


def _is_one(size: object) -> bool:
    return isinstance(size, int) and size == 1


def _same_place(before: tuple, after: tuple, dim: int) -> int | None:
    front = _volume(before[:dim])
    for place, size in enumerate(after):
        if statically_known_true(size == before[dim]) and statically_known_true(_volume(after[:place]) == front):
            return place
    return None


def _volume(sizes: tuple) -> object:
    result = 1
    for size in sizes:
        result = result * size
    return result

"""packed_weights: copies of weights in another order, made once and kept as long as the weights."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from tide_compile.kernels.cpu.onednn import bytes_of

_copies: MutableMapping[Tensor, dict[tuple, _Copy]] = WeakTensorKeyDictionary()  # of the first weight of each


def packed_bytes() -> int:
    """Bytes of all copies of weights that there are in this process, see ``TIDEConfig.pack_weights``."""
    found = [each.copy for copies in list(_copies.values()) for each in list(copies.values())]
    return sum(map(bytes_of, found))


def drop_packed() -> None:
    """Forget all copies of weights: they are made anew when they are next needed. For weights that were written to in a
    way that cannot be noticed, see ``copy_of``."""
    _copies.clear()


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy, and of what: ``state`` of the weights, and their memory, so that no other gets the same name."""

    state: list[tuple[int, int, int | None]]
    memory: list[StorageWeakRef]
    copy: Tensor


def copy_of(weights: Sequence[Tensor], kind: object, make: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``make`` does of weights [N, K] one above the other, made once and kept as long as the first is.

    Weights that have got other values or other memory since are copied again. Not noticed are values that were written
    in place through ``.data``, as PEFT does when it merges an adapter, or into inference tensors: ``drop_packed``.
    """
    copies = _copies.setdefault(weights[0], {})
    key = kind, *map(id, weights)
    state = [
        (w.untyped_storage()._cdata, w.storage_offset(), None if w.is_inference() else w._version) for w in weights
    ]
    known = copies.get(key)
    if known is None or known.state != state:
        for stale in [k for k, c in list(copies.items()) if any(memory.expired() for memory in c.memory)]:
            del copies[stale]
        whole = weights[0] if len(weights) == 1 else torch.cat(weights)
        memory = [StorageWeakRef(weight.untyped_storage()) for weight in weights]
        copies[key] = known = _Copy(state, memory, make(whole.detach()))
    return known.copy

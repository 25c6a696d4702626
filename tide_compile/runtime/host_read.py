"""CountsReader: the one host read per checkpoint."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class CountsReader:
    """Reads the counts of a checkpoint, [k] int64, into Python.

    On a GPU they are copied into pinned memory on the current stream, and only that copy is waited for; one buffer per
    thread, since threads may run the same compiled graph.

    Args:
        size: k.
    """

    def __init__(self, size: int) -> None:
        self._size, self._local = size, threading.local()

    def __call__(self, counts: Tensor) -> list[int]:
        if counts.device.type != "cuda":
            return counts.tolist()
        if not hasattr(self._local, "buffer"):
            self._local.buffer = torch.empty(self._size, dtype=counts.dtype, pin_memory=True)
            self._local.event = torch.cuda.Event()
        self._local.buffer.copy_(counts, non_blocking=True)
        self._local.event.record(torch.cuda.current_stream(counts.device))
        self._local.event.synchronize()
        return self._local.buffer.tolist()

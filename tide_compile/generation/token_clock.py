"""TokenClock: when each token of a ``generate`` arrives."""

from __future__ import annotations

import time

from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class TokenClock(BaseStreamer):
    """A streamer for ``generate`` that notes when each token arrives; the first arrival is the prompt."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []

    def put(self, value: Tensor) -> None:
        self.arrivals.append(time.perf_counter())

    def end(self) -> None:
        pass

    def seconds(self) -> list[float]:
        """Seconds of each token after the first."""
        return [b - a for a, b in zip(self.arrivals[1:], self.arrivals[2:], strict=False)]

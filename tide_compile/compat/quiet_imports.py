"""quiet_imports: while this package imports others, those do not write warnings of their own to stderr."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_NOISY = ("torchao", "torch.utils._pytree")  # transformers imports torchao, which tells what it cannot load here


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Inside, loggers of other packages that warn while they are imported say errors only."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

"""versions: for which torch the private names in this folder were checked, and which of them are missing."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Iterable

import torch

log = logging.getLogger("tide_compile")

CHECKED = ("2.13",)


def is_checked() -> bool:
    """Whether this torch is of a release that was checked."""
    return ".".join(torch.__version__.split(".")[:2]) in CHECKED


@functools.cache
def warn_if_unchecked(what: str) -> bool:
    """As ``is_checked``; where it is not, that is logged, once for each ``what``."""
    if not is_checked():
        log.warning(
            "%s was checked with torch %s, and this is %s. If anything is odd, switch it off with "
            "TIDE_DISABLE or options={'disable': [...]}.",
            what, ", ".join(CHECKED), torch.__version__,
        )  # fmt: skip
    return is_checked()


def missing(names: Iterable[str]) -> list[str]:
    """Those of these dotted names that this torch does not have."""
    return [name for name in names if not _exists(name)]


def _exists(name: str) -> bool:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False

"""hash_of_sources: what Inductor's caches tell code by that was made with passes and operators of ours."""

from __future__ import annotations

import functools
from pathlib import Path

import tide_compile.kernels
from tide_compile.torch_internals.fx import get_hash_for_files

_FOLDERS = (Path(__file__).parent, *map(Path, tide_compile.kernels.__path__))


@functools.cache
def hash_of_sources() -> bytes:
    """Of all files of these passes, and of the operators that they write into graphs: the caches look into neither."""
    return get_hash_for_files(tuple(sorted(str(file) for folder in _FOLDERS for file in folder.rglob("*.py"))))

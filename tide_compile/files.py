"""Files: written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write a safetensors file atomically: into a temporary file in the same folder, then renamed over ``path``."""
    path = Path(path)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return path


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        Path(temporary).write_text(text)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[str]:
    """The name of a temporary file in the same folder, which is renamed over ``path`` when the block is done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def cache_folder() -> Path:
    """``$TIDE_CACHE``, else ``tide_compile`` in the user's cache folder."""
    base = os.environ.get("TIDE_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tide_compile"


def router_cache() -> Path:
    """The folder of routers by model fingerprint."""
    return cache_folder() / "routers"

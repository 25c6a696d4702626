"""code_cache: whether Inductor can keep its code, said in one sentence before it has generated any."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

from tide_compile.errors import OutputFileError

_LEAST = 32 << 20  # bytes: less does not hold the headers that are compiled first


@functools.cache
def check_code_cache(folder: Path, compiles_cpp: bool) -> None:
    """Once per folder and process.

    Args:
        compiles_cpp: whether names of files are going to be in a compiler's command, which Inductor splits at blanks.

    Raises:
        OutputFileError: nothing can be written to ``folder``, or no compiler be told of it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _error(folder, f"which cannot be written ({error.strerror})") from error
    if free < _LEAST:
        raise _error(folder, f"where {free >> 20} MB are free and {_LEAST >> 20} are needed")
    if compiles_cpp and len(str(folder).split()) > 1:
        raise _error(folder, "a name with blanks, which it cannot hand to a C++ compiler")


def _error(folder: Path, why: str) -> OutputFileError:
    return OutputFileError(
        f"Inductor keeps its code in {str(folder)!r}, {why}: set TORCHINDUCTOR_CACHE_DIR to another folder."
    )

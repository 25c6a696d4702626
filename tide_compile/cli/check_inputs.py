"""check_inputs: what a command line asks for that cannot be had, found before anything is loaded. Errors name the
option."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from tide_compile.errors import ConfigError, TideError
from tide_compile.files import check_writable, user_path
from tide_compile.model.loading import find_dtype
from tide_compile.planning.forecast import find_device
from tide_compile.routers.router_file import check_router_file
from tide_compile.text.corpus import SELF
from tide_compile.text.sources import calibration_texts, sources_of


@contextmanager
def option(name: str) -> Iterator[None]:
    """Errors of the body begin with the option."""
    try:
        yield
    except TideError as error:
        raise type(error)(f"{name}: {error}") from error


def check_dtype(name: str) -> torch.dtype:
    """The dtype of a name. Raises ConfigError."""
    with option("--dtype"):
        return find_dtype(name)


def check_files(**paths: str | Path | None) -> None:
    """Whether files can be written, by option. Raises OutputFileError."""
    for name, path in paths.items():
        if path is not None:
            with option(f"--{name}"):
                check_writable(path)


def check_folder(name: str, folder: Path | None) -> None:
    """Whether files can be written into a folder that need not be there. Raises OutputFileError."""
    if folder is not None:
        with option(name):
            check_writable(folder / "file")


def check_router(path: str | None) -> None:
    """Whether there are routers in a file. Raises RouterFileError."""
    if path is not None:
        with option("--router"):
            check_router_file(user_path(path))


def check_data(source: str, texts: int) -> None:
    """Whether there are texts: all of so many where they lie here, else the first. Raises CalibrationDataError."""
    with option("--data"):
        for part in sources_of(source):
            if part != SELF:
                here = part == "pydoc" or os.path.isfile(user_path(part))
                for _ in calibration_texts(part, texts if here else 1):
                    pass


def check_device(name: str | None, dtype: torch.dtype) -> None:
    """Whether a device to predict for is known; ``cpu`` is, without measuring it. Raises ConfigError."""
    if name is not None and name.lower() != "cpu":
        with option("--device"):
            find_device(name, dtype)


def room_for(config: PreTrainedConfig, prompt: int, tokens: int) -> int:
    """How many of so many tokens fit behind ``prompt`` tokens into the positions that a model was made for.

    Raises:
        ConfigError: none.
    """
    text = config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if not positions or "dynamic" in str(scaling):  # those stretch themselves to longer texts
        return tokens
    if prompt >= positions:
        raise ConfigError(
            f"--prompt: {prompt} tokens, and this model was made for {positions} positions: what it would write is "
            "rubbish. Give a shorter one."
        )
    return min(tokens, positions - prompt)

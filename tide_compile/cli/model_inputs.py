"""model_inputs: from what a user typed to an engine and token ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import BatchEncoding

from tide_compile.config import TIDEConfig
from tide_compile.errors import ConfigError, NoRouterError
from tide_compile.generation.engine import TIDE
from tide_compile.routers.bank import RouterBank
from tide_compile.routers.lookup import resolve_bank


def open_engine(
    model: torch.nn.Module, router: str | None, threshold: float | None, name: str, **options: object
) -> TIDE:
    """The engine; a model without routers is told how to get some."""
    try:
        return TIDE(model, router, TIDEConfig(exit_threshold=threshold, **options))
    except NoRouterError as error:
        raise NoRouterError(
            f"{name!r} has no routers yet. Make them once with `tide calibrate {name}`, or pass --router FILE, or "
            "--threshold 1 to run without exits."
        ) from error


def encode(tokenizer: object, prompts: Sequence[str], chat: bool) -> BatchEncoding:
    """Token ids and mask [B, S], padded on the left.

    Raises:
        ConfigError: ``chat`` with a tokenizer that has no chat template, or a prompt without a single token.
    """
    for number, prompt in enumerate(prompts, 1):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"--prompt: number {number} holds bytes that are no text in UTF-8.") from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat and not tokenizer.chat_template:
        raise ConfigError("this model's tokenizer has no chat template: leave --chat out.")
    if chat:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )
    else:
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
    lengths = inputs["attention_mask"].sum(-1).tolist()
    if 0 in lengths:
        raise ConfigError(
            f"--prompt: number {lengths.index(0) + 1} has no tokens, so there is nothing to go on from: give some text."
        )
    return inputs


def find_bank_maybe(router: str | None, model: torch.nn.Module) -> RouterBank | None:
    """The model's routers, None if it has none yet."""
    try:
        return resolve_bank(router, model)
    except NoRouterError:
        return None

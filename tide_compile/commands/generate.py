"""``tide generate``: text from a model with exits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import BatchEncoding, TextStreamer, set_seed

from tide_compile.commands.output import console, notes, print_json, record_of, size_of, working
from tide_compile.config import TIDEConfig
from tide_compile.engine import TIDE
from tide_compile.errors import ConfigError, NoRouterError
from tide_compile.kernels.linear import packed_bytes
from tide_compile.loading import find_dtype, load_model, load_tokenizer


def generate_text(
    name: str, prompts: Sequence[str], *, router: str | None, threshold: float | None, max_new_tokens: int, chat: bool,
    temperature: float, seed: int, dtype: str, pack_weights: bool, stream: bool, html: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Print what the model makes of each prompt, or write it to stdout as JSON; ``html``: the token depth view, too."""
    with working(f"loading {name}"):
        model, tokenizer = load_model(name, find_dtype(dtype)), load_tokenizer(name)
        engine = open_engine(model, router, threshold, name, pack_weights=pack_weights)
    inputs = encode(tokenizer, prompts, chat).to(model.device)
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    started = time.perf_counter()
    with nullcontext() if stream else working("generating (the first time, this compiles)"):
        ids = engine.generate(
            **inputs, **sampling, max_new_tokens=max_new_tokens, streamer=streamer, tokenizer=tokenizer,
            pad_token_id=tokenizer.pad_token_id, trace=html is not None or as_json,
        )  # fmt: skip
    seconds = time.perf_counter() - started
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if html is not None:
        engine.last_trace.to_html(html, title=f"Token depth: {Path(name).name}")
    if as_json:
        depths = {str(layer): n for layer, n in engine.last_trace.depths().items()}
        print_json(
            {
                "model": name, "texts": texts, "seconds": seconds, "exits": record_of(engine.last_stats),
                "generated_tokens_by_layer": depths, "html": html, "packed_bytes": packed_bytes(),
            }
        )  # fmt: skip
        return
    for text in () if stream else texts:
        console().print(text, markup=False, soft_wrap=True)
    notes().print(engine.last_stats.summary(), style="dim", markup=False)
    if pack_weights:
        notes().print(f"copies of weights: {size_of(packed_bytes())}", style="dim")
    if html is not None:
        notes().print(f"token depth view: {html}", style="dim", markup=False)


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
        ConfigError: ``chat`` with a tokenizer that has no chat template.
    """
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not chat:
        return tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
    if not tokenizer.chat_template:
        raise ConfigError("this model's tokenizer has no chat template: leave --chat out.")
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )

"""``tide generate``: text from a model with exits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from transformers import TextStreamer, set_seed

from tide_compile.cli.check_inputs import check_dtype, check_files, check_router, room_for
from tide_compile.cli.model_inputs import encode, open_engine
from tide_compile.cli.output import console, notes, print_json, size_of, working
from tide_compile.kernels.cpu.packed_weights import packed_bytes
from tide_compile.model.loading import load_config, load_model, load_tokenizer


def generate_text(
    name: str, prompts: Sequence[str], *, router: str | None, threshold: float | None, max_new_tokens: int, chat: bool,
    temperature: float, seed: int, dtype: str, pack_weights: bool, stream: bool, html: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Print what the model makes of each prompt, or write it to stdout as JSON; ``html``: the token depth view, too."""
    chosen = check_dtype(dtype)
    check_files(html=html)
    check_router(router)
    with working(f"loading {name}"):
        config, tokenizer = load_config(name), load_tokenizer(name)
        inputs = encode(tokenizer, prompts, chat)
        room = room_for(config, inputs["input_ids"].shape[1], max_new_tokens)
        model = load_model(name, chosen)
        engine = open_engine(model, router, threshold, name, pack_weights=pack_weights)
    if room < max_new_tokens:
        notes().print(f"at most {room} tokens: there the positions that the model was made for end", style="yellow")
    inputs = inputs.to(model.device)
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    started = time.perf_counter()
    what = "generating (the first call compiles, which can take minutes)"
    if stream:
        notes().print(f"{what} ...", style="dim")
    with nullcontext() if stream else working(what):
        ids = engine.generate(
            **inputs, **sampling, max_new_tokens=room, streamer=streamer, tokenizer=tokenizer,
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
                "model": name, "texts": texts, "seconds": seconds, "exits": engine.last_stats.to_dict(),
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

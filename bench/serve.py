"""python -m bench.serve: the server under many requests at once, against the same requests offline.

Generates from all prompts, one after the other, then starts the server of ``tide_compile.serving`` around the same
engine on loopback and sends all requests at the same moment through OpenAI's client (every second one streamed). Prints
how many were answered, how many have the offline text (greedy), latencies and tokens per second. ``--leave``: the share
of tokens that leave after a third of the layers (synthetic routers: what exits are worth, not what they get right).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import uvicorn
from fastapi import FastAPI
from openai import AsyncOpenAI, OpenAIError

from bench.support.models import SMOLLM2, load_model
from bench.support.report import show
from tide_compile import TIDE, TIDEConfig, synthetic_routers
from tide_compile.serving import build_app, one_thread
from tide_compile.text.sources import calibration_texts

_PROMPT = 120  # characters


@dataclass(frozen=True, slots=True)
class Answer:
    """``seconds`` from sending to the last byte, ``first`` to the first token of a streamed one."""

    text: str
    seconds: float
    first: float | None


@contextlib.contextmanager
def serving(app: FastAPI, grace: int = 2) -> Iterator[str]:
    """The app under uvicorn in a thread, on a free port of loopback: its address. Leaving the block stops it."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=grace))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start; its log says why.")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


async def ask(client: AsyncOpenAI, prompt: str, tokens: int, stream: bool) -> Answer | OpenAIError:
    started = time.perf_counter()
    request = {"model": "bench", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    try:
        if not stream:
            reply = await client.completions.create(**request)
            return Answer(reply.choices[0].text, time.perf_counter() - started, None)
        text, first = "", None
        async for chunk in await client.completions.create(**request, stream=True):
            first = first or time.perf_counter() - started
            text += chunk.choices[0].text
        return Answer(text, time.perf_counter() - started, first)
    except OpenAIError as error:
        return error


async def ask_all(url: str, prompts: list[str], tokens: int) -> list[Answer | OpenAIError]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=None) as client:
        return await asyncio.gather(*(ask(client, p, tokens, i % 2 == 1) for i, p in enumerate(prompts)))


def generate(engine: TIDE, tokenizer: object, prompt: str, tokens: int) -> tuple[str, int]:
    """Offline: text and number of the new tokens. The text is that of all tokens without the prompt's: the first of the
    new ones may have a blank in front."""
    inputs = tokenizer(prompt, return_tensors="pt")
    (ids,) = engine.generate(**inputs, max_new_tokens=tokens, do_sample=False).tolist()
    length = inputs["input_ids"].shape[1]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text = tokenizer.decode(ids, **options).removeprefix(tokenizer.decode(ids[:length], **options))
    return text, len(ids) - length


def ready(args: argparse.Namespace, prompts: list[str]) -> tuple[TIDE, object, float]:
    """The engine, compiled, its tokenizer, and the seconds that compiling took."""
    model, tokenizer = load_model(args.model, getattr(torch, args.dtype))
    depth = model.config.num_hidden_layers // 3
    bank, config = None, TIDEConfig(exit_threshold=1.0)
    if args.leave:
        ids = tokenizer(" ".join(prompts[:10]), return_tensors="pt")["input_ids"]
        bank = synthetic_routers(model, ids, {depth - 1: args.leave})
        config = TIDEConfig(exit_threshold=0.85, min_layers=depth, checkpoint_interval=depth)
    engine = TIDE(model, bank, config)
    return engine, tokenizer, engine.warmup(max_new_tokens=240)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="smollm2, a hub name or a folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=24, help="of a reply")
    parser.add_argument("--leave", type=float, default=0.5, help="share of tokens that leave early, 0 to 1")
    parser.add_argument("--json", help="also write the result to this file")
    args = parser.parse_args()
    prompts = [" ".join(t.split())[:_PROMPT] for t in calibration_texts("pydoc", args.requests)]
    pool = one_thread()
    engine, tokenizer, compiling = pool.submit(ready, args, prompts).result()
    started = time.perf_counter()
    offline = pool.submit(lambda: [generate(engine, tokenizer, prompt, args.tokens) for prompt in prompts]).result()
    alone = time.perf_counter() - started
    app = build_app(engine, tokenizer, "bench", waiting=len(prompts), total_tokens=256, warmup=False, pool=pool)
    with serving(app) as url:
        started = time.perf_counter()
        answers = asyncio.run(ask_all(url, prompts, args.tokens))
        served = time.perf_counter() - started
    answered = [a for a in answers if isinstance(a, Answer)]
    for error in {str(a) for a in answers if not isinstance(a, Answer)}:
        print(f"not answered: {error}")
    pairs = zip(answers, offline, strict=True)
    equal = sum(isinstance(answer, Answer) and answer.text == text for answer, (text, _) in pairs)
    tokens = sum(count for _, count in offline)
    seconds = [a.seconds for a in answered]
    spread = (statistics.median(seconds), statistics.quantiles(seconds, n=10)[-1], max(seconds))
    firsts = [a.first for a in answered if a.first is not None]
    rows = [
        ["requests at once", len(prompts)],
        ["answered", len(answered)],
        ["text equal to offline", equal],
        ["latency, s: median, 90 %, longest", ", ".join(f"{s:.1f}" for s in spread)],
        ["first token of streamed ones, s: median", f"{statistics.median(firsts):.1f}"],
        ["tokens per second, served", f"{tokens / served:.1f}"],
        ["tokens per second, offline", f"{tokens / alone:.1f}"],
        ["warm-up before, s", f"{compiling:.1f}"],
        ["tokens that left early", f"{engine.stats.exit_rate:.0%}"],
    ]
    title = f"{args.model}, {args.dtype}, up to {args.tokens} tokens each, one thread generates"
    show(title, ["", "result"], rows, args.json)
    if len(answered) < len(prompts) or equal < len(prompts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

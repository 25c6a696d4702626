"""Serve a model to OpenAI's clients: completions and chat, streamed or not, on this machine.

    pip install 'tide-compile[serve]'
    python examples/serve.py HuggingFaceTB/SmolLM2-135M-Instruct --router router.safetensors
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \
        -d '{"prompt": "Hello", "max_tokens": 20, "exit_threshold": 0.9}'

Requests are generated one after the other; those that come meanwhile wait in a line of --waiting places, and further
ones are told when to come again (429). ``exit_threshold`` can be given per request. There is no authentication and no
encryption: --host other than loopback belongs behind a proxy that has both.
"""

import logging
from pathlib import Path
from typing import Annotated

import typer
import uvicorn

from tide_compile import TIDE, TIDEConfig
from tide_compile.model.loading import find_dtype, load_model, load_tokenizer
from tide_compile.serving import build_app, one_thread


def main(
    model: Annotated[str, typer.Argument(help="Hub name, folder or GGUF file.")],
    router: Annotated[str | None, typer.Option(help="Router file; default: from the router cache.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Exit threshold; 1 needs no routers.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "bf16",
    name: Annotated[str | None, typer.Option(help="What clients call the model; default: MODEL's last part.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0: any that is free.")] = 8000,
    waiting: Annotated[int, typer.Option(help="Requests that may wait while one runs.")] = 64,
    total_tokens: Annotated[int, typer.Option(help="Most tokens of a prompt and its reply together.")] = 2048,
    max_bytes: Annotated[int, typer.Option(help="Largest body of a request.")] = 1 << 18,
    grace: Annotated[int, typer.Option(help="Seconds that unfinished requests get when the server stops.")] = 10,
) -> None:
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("tide_compile").setLevel(logging.INFO)
    pool = one_thread()
    engine = pool.submit(
        lambda: TIDE(load_model(model, find_dtype(dtype)), router, TIDEConfig(exit_threshold=threshold))
    ).result()
    tokenizer = load_tokenizer(model)
    app = build_app(
        engine,
        tokenizer,
        name or Path(model).name.removesuffix(".gguf"),
        waiting=waiting,
        total_tokens=total_tokens,
        max_bytes=max_bytes,
        pool=pool,
    )
    uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=grace)


if __name__ == "__main__":
    typer.run(main)

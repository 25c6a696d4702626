"""tide: the command. Each subcommand's work lives in a module of its own; here are names, options and exit codes.

Exit codes: 0 done, 1 it failed and one line says why, 2 the command line is wrong, 130 it was interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from tide_compile.cli.options import Debug, Dtype, Json, Model, Page, Router, Threshold
from tide_compile.cli.output import begin_log, notes

_ON_A_TERMINAL = sys.stdout.isatty() and sys.stderr.isatty()
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode="rich" if _ON_A_TERMINAL else None,  # no boxes in pipes
    context_settings={} if _ON_A_TERMINAL else {"terminal_width": 120},
)  # fmt: skip
_INTERRUPTED = 130  # as a shell says it


@app.callback()
def tide() -> None:
    """Decoder layers that a token does not need are not run."""


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Hub name, folder or GGUF file; default: a small one.")] = None,
    samples: Annotated[int, typer.Option(min=5, help="Calibration texts.")] = 30,
    threshold: Annotated[float, typer.Option(min=0.0, max=1.0, help="Exit threshold.")] = 0.85,
    tokens: Annotated[int, typer.Option(min=4, help="Tokens to generate.")] = 40,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each contender generates.")] = 3,
    router: Annotated[Path | None, typer.Option(help="Router file to write; default: in the router cache.")] = None,
    html: Page = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Calibrate a real model, generate with it, and compare with eager and stock Inductor (some minutes)."""
    with one_line_errors(debug):
        from tide_compile.cli.demo import run_demo

        run_demo(model, samples=samples, threshold=threshold, tokens=tokens, rounds=rounds, router=router, html=html,
                 as_json=json)  # fmt: skip


@app.command()
def calibrate(
    model: Model,
    data: Annotated[str | None, typer.Option(help="Data set, .txt or .jsonl file, pydoc, self; A+B.")] = None,
    samples: Annotated[int | None, typer.Option(min=5, help="Texts; default 2000.")] = None,
    save: Annotated[Path | None, typer.Option(help="Router file to write; default: in the router cache.")] = None,
    interval: Annotated[int | None, typer.Option(min=1, help="Layers between checkpoints; default 4.")] = None,
    min_layers: Annotated[int | None, typer.Option(min=1, help="Layers before the first; default 8.")] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Of distillation, per checkpoint; default 200.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put texts into the model's chat template.")] = False,
    max_disagreement: Annotated[
        float | None, typer.Option(help="Certify thresholds for at most this share of other tokens.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the certificate.")] = 0.95,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to measure it on.")] = 500,
    dtype: Dtype = "fp32",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make routers for a model, once."""
    with one_line_errors(debug):
        from tide_compile.cli.calibrate import calibrate_model

        settings = {
            "calibration_dataset": data,
            "calibration_samples": samples,
            "checkpoint_interval": interval,
            "min_layers": min_layers,
            "distillation_steps": steps,
        }
        calibrate_model(model, save, dtype=dtype, as_json=json, settings=settings, chat=chat,
                        max_disagreement=max_disagreement, confidence=confidence, num_prompts=prompts)  # fmt: skip


@app.command()
def tune(
    model: Model,
    router: Router = None,
    device: Annotated[
        str | None, typer.Option(help="Tune for a GPU (H100, ...) or cpu as predicted; default: time this machine.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Prompts; default: after those of the calibration.")] = None,
    prompts: Annotated[int, typer.Option(min=2, help="Half to choose candidates, half to measure.")] = 128,
    tokens: Annotated[int, typer.Option(min=2, help="Generated after each.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Put texts into the model's chat template.")] = False,
    max_disagreement: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Recommend the fastest point with at most this.")
    ] = None,
    min_speedup: Annotated[
        float | None, typer.Option(min=1.0, help="Recommend the most faithful point with at least this.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the frontier into this PNG file.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write routers with the recommended thresholds.")] = None,
    dtype: Dtype = "fp32",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Sweep checkpoints and thresholds: layers saved, speed and agreement, and which to use.

    The exit code is 1 if no point keeps what was asked for.
    """
    with one_line_errors(debug):
        from tide_compile.cli.tune import Asked, tune_model

        asked = Asked(model, router=router, device=device, data=data, prompts=prompts, max_new_tokens=tokens, chat=chat,
                      max_disagreement=max_disagreement, min_speedup=min_speedup, plot=plot, save=save,
                      dtype=dtype)  # fmt: skip
        if not tune_model(asked, json):
            raise typer.Exit(1)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="Text to go on from; give it again for a batch.")],
    router: Router = None,
    threshold: Threshold = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy; else sampling.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    dtype: Dtype = "fp32",
    pack_weights: Annotated[
        bool, typer.Option("--pack-weights", help="Keep copies of weights for faster products (CPU).")
    ] = False,
    html: Page = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate text with exits."""
    if stream and (json or len(prompt) > 1):
        raise typer.BadParameter("--stream prints the text of one prompt: leave --json and other prompts out.")
    with one_line_errors(debug):
        from tide_compile.cli.generate import generate_text

        generate_text(model, prompt, router=router, threshold=threshold, max_new_tokens=max_new_tokens, chat=chat,
                      temperature=temperature, seed=seed, dtype=dtype, pack_weights=pack_weights, stream=stream,
                      html=html, as_json=json)  # fmt: skip


@app.command()
def inspect(
    what: Annotated[str, typer.Argument(metavar="MODEL|ROUTER", help="A model, or a router file.")],
    router: Router = None,
    threshold: Threshold = None,
    prompt: Annotated[str, typer.Option(help="Text whose graph is looked at.")] = "The tide goes out twice a day.",
    dump: Annotated[Path | None, typer.Option(help="Compile, and write everything to this folder.")] = None,
    dtype: Dtype = "fp32",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Tell what the compiler does with a model, or what a router file holds."""
    with one_line_errors(debug):
        from tide_compile.cli.inspect import inspect_path

        inspect_path(what, router=router, threshold=threshold, prompt=prompt, dtype=dtype, folder=dump, as_json=json)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which; without one, they are listed.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a benchmark of a checkout; further options are its own (`tide bench decode --rounds 5`)."""
    with one_line_errors(debug):
        from tide_compile.cli.bench import list_benchmarks, run_benchmark

        if name is None:
            list_benchmarks(json)
        elif code := run_benchmark(name, context.args, json):
            raise typer.Exit(code)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="Tell what would happen to this model, and why.")] = None,
    dtype: Dtype = "fp32",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Look at versions, devices, caches and routers. The exit code is 1 if something keeps models from compiling."""
    with one_line_errors(debug):
        from tide_compile.cli.doctor import examine

        if not examine(model, dtype, json):
            raise typer.Exit(1)


@app.command()
def kernels(
    capability: Annotated[list[float] | None, typer.Option("--cc", help="Compute capability, such as 8.0.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32, fp16 or bf16.")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Rows (tokens) of a call; default 1 and 2048.")] = None,
    hidden: Annotated[int, typer.Option(help="Hidden size.")] = 4096,
    bottleneck: Annotated[int, typer.Option(help="Width of a router.")] = 128,
    rank: Annotated[int, typer.Option(help="Rank of low-rank exit projections.")] = 64,
    every: Annotated[bool, typer.Option("--every", help="All configurations that tuning tries.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Build every Triton kernel for every GPU, without a GPU, and tell what came out.

    --cc, --dtype and --rows can be given more than once. The roofline is the time that moving the bytes takes at the
    card's published bandwidth: no kernel is faster.
    """
    with one_line_errors(debug):
        from tide_compile.cli.kernels import show_kernels

        sizes = {"hidden": hidden, "bottleneck": bottleneck, "rank": rank}
        if not show_kernels(capability, dtype, rows or [1, 2048], sizes, every, json):
            raise typer.Exit(1)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Hub name, folder or GGUF file; only its config is read.")],
    device: Annotated[str, typer.Option(help="cpu (this one, measured) or a GPU: V100, T4, A100, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "bf16",
    batch: Annotated[list[int] | None, typer.Option(help="Sequences; default 1, 8 and 64.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Tokens in the cache; default 1024.")] = None,
    depth: Annotated[list[int] | None, typer.Option(help="Layers before an exit; default a third, two thirds.")] = None,
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of tokens that leave there.")] = 0.4,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Tell what exits would bring on a device that need not be there.

    Predicted from the operations and bytes of the model's graph and the device's published rates. --batch, --context
    and --depth can be given more than once.
    """
    with one_line_errors(debug):
        from tide_compile.cli.plan import show_plan

        show_plan(model, device, dtype, batch or [1, 8, 64], context or [1024], depth, share, json)


@app.command()
def warmup(
    model: Model,
    router: Router = None,
    dtype: Dtype = "fp32",
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    threshold: Threshold = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compile for a model now, so that the next process finds the code in the caches."""
    with one_line_errors(debug):
        from tide_compile.cli.warmup import warm_up

        warm_up(model, router, threshold, dtype, batch, json)


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Errors of the body as one line on stderr and exit code 1, an interruption as 130; with ``debug`` as they are."""
    begin_log(debug)
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        if debug:
            raise
        notes().print("interrupted", style="yellow")
        raise typer.Exit(_INTERRUPTED) from None
    except Exception as error:
        if debug:
            raise
        text = " ".join(str(error).split()) or repr(error)
        notes().print(f"[bold red]error:[/] {type(error).__name__}: ", end="", soft_wrap=True)
        notes().print(text, markup=False, soft_wrap=True)
        raise typer.Exit(1) from error

"""tide: the command. Each subcommand's work lives in a module of its own; here are names, options and exit codes.

Exit codes: 0 done, 1 it failed and one line says why, 2 the command line is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")]


@app.callback()
def tide() -> None:
    """Decoder layers that a token does not need are not run."""


@app.command()
def kernels(
    capability: Annotated[list[float] | None, typer.Option("--cc", help="Compute capability, such as 8.0.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32, fp16 or bf16.")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Rows (tokens) of a call; default 1 and 2048.")] = None,
    hidden: Annotated[int, typer.Option(help="Hidden size.")] = 4096,
    bottleneck: Annotated[int, typer.Option(help="Width of a router.")] = 128,
    rank: Annotated[int, typer.Option(help="Rank of low-rank exit projections.")] = 64,
    every: Annotated[bool, typer.Option("--every", help="All configurations that tuning tries.")] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    debug: Debug = False,
) -> None:
    """Build every Triton kernel for every GPU, without a GPU, and tell what came out.

    --cc, --dtype and --rows can be given more than once. The roofline is the time that moving the bytes takes at the
    card's published bandwidth: no kernel is faster.
    """
    with one_line_errors(debug):
        from tide_compile.kernel_table import show_kernels

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
    json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    debug: Debug = False,
) -> None:
    """Tell what exits would bring on a device that need not be there.

    Predicted from the operations and bytes of the model's graph and the device's published rates. --batch, --context
    and --depth can be given more than once.
    """
    with one_line_errors(debug):
        from tide_compile.plan_table import show_plan

        show_plan(model, device, dtype, batch or [1, 8, 64], context or [1024], depth, share, json)


@app.command()
def warmup(
    model: Annotated[str, typer.Argument(help="Hub name, folder or GGUF file.")],
    router: Annotated[str | None, typer.Option(help="Router file; default: from the router cache.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "bf16",
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    threshold: Annotated[float, typer.Option(min=0.0, max=1.0, help="Exit threshold; 1 needs no routers.")] = 0.85,
    debug: Debug = False,
) -> None:
    """Compile for a model now, so that the next process finds the code in the caches."""
    with one_line_errors(debug):
        from tide_compile import TIDE, TIDEConfig
        from tide_compile.loading import find_dtype, load_model

        engine = TIDE(load_model(model, find_dtype(dtype)), router, TIDEConfig(exit_threshold=threshold))
        Console().print(f"compiled for batches of {batch} in {engine.warmup(batch):.1f} s")


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Errors of the body as one line on stderr and exit code 1; with ``debug`` as they are."""
    try:
        yield
    except (typer.Exit, typer.Abort, KeyboardInterrupt):
        raise
    except Exception as error:
        if debug:
            raise
        text = " ".join(str(error).split()) or repr(error)
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print(text)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()

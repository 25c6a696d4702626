"""options: those that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Debug = Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout instead of text.")]
Model = Annotated[str, typer.Argument(help="Hub name, folder or GGUF file.")]
Router = Annotated[str | None, typer.Option(help="Router file; default: from the router cache.")]
Dtype = Annotated[str, typer.Option(help="fp32, fp16 or bf16.")]
Threshold = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="A token leaves when its score is above; 1: no exits. Default: the routers'."),
]
Page = Annotated[Path | None, typer.Option(help="Write the token depth view to this file.")]

"""``python -m tide_compile.cli``."""

from tide_compile.cli.main import app

app()

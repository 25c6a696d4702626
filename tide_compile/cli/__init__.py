"""The ``tide`` command: names, options and exit codes in ``main``, the work of each command in a file of its own."""

from tide_compile.cli.main import app

__all__ = ["app"]

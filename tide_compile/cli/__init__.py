"""The ``tide`` command: names, options and exit codes are in ``main``, the work of each command in its own file."""

from tide_compile.cli.main import app

__all__ = ["app"]

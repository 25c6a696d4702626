"""The work of the ``tide`` commands, a module each; names, options and exit codes are in ``tide_compile.cli``."""

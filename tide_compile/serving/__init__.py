"""Serving: an OpenAI-compatible application around one engine."""

from tide_compile.serving.app import build_app
from tide_compile.serving.worker import one_thread

__all__ = ["build_app", "one_thread"]

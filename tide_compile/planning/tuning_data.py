"""tuning_data: the text that a frontier is measured on, which calibration has not read."""

from __future__ import annotations

from tide_compile.errors import ConfigError
from tide_compile.routers.bank import RouterBank
from tide_compile.text.sources import calibration_texts, sources_of

_TEXTS, _TEXT_TOKENS = 16, 256  # for the perplexity


def tuning_data(bank: RouterBank, data: str | None) -> tuple[str, int]:
    """Where prompts come from, and how many calibration rows of it to pass over.

    Raises:
        ConfigError: nothing is given, and the routers do not say what they were made of.
    """
    made_of = bank.metadata.get("data")
    source = data or made_of
    if not isinstance(source, str) or source == "list":
        raise ConfigError("these routers do not say what they were made of: give --data.")
    seen = bank.metadata.get("config", {}).get("calibration_samples", 0)
    return source, seen if source == made_of else 0


def perplexity_texts(source: str, tokenizer: object) -> list[list[int]]:
    """Token ids of some texts; none where the model's own samples are all there is."""
    texts = next((s for s in sources_of(source) if s != "self"), None)
    if texts is None:
        return []
    ids = tokenizer(list(calibration_texts(texts, _TEXTS)), truncation=True, max_length=_TEXT_TOKENS)["input_ids"]
    return [row for row in ids if len(row) > 1]

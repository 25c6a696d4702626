"""``tide calibrate``: routers for a model, from the command line."""

from __future__ import annotations

import time
from pathlib import Path

from tide_compile.calibration.calibrate import calibrate
from tide_compile.cli.check_inputs import check_data, check_dtype, check_files, check_folder, option
from tide_compile.cli.output import console, print_json, working
from tide_compile.cli.router_tables import checkpoint_table, sentence_of
from tide_compile.config import TIDEConfig
from tide_compile.errors import ConfigError
from tide_compile.files import router_cache
from tide_compile.model.loading import load_model, load_tokenizer
from tide_compile.routers.lookup import cached_file
from tide_compile.thresholds.certify import CERTIFICATE, count_tested
from tide_compile.thresholds.risk_control import check_bound


def calibrate_model(
    name: str, save: Path | None, *, dtype: str, as_json: bool, settings: dict[str, object], chat: bool,
    max_disagreement: float | None, confidence: float, num_prompts: int,
) -> None:  # fmt: skip
    """Calibrate and show the table. ``settings``: fields of ``TIDEConfig``; None means its default. The others are
    arguments of ``calibrate``."""
    config = TIDEConfig(**{n: value for n, value in settings.items() if value is not None})
    chosen = check_dtype(dtype)
    if save is None:
        check_folder("--save (or TIDE_CACHE)", router_cache())
    check_files(save=save)
    if max_disagreement is not None:
        with option("--max-disagreement, --confidence, --prompts"):
            check_bound(max_disagreement, confidence, count_tested(num_prompts))
    check_data(config.calibration_dataset, config.calibration_samples)
    with working(f"loading {name}"):
        tokenizer = load_tokenizer(name)
        if chat and not tokenizer.chat_template:
            raise ConfigError("--chat: this model's tokenizer has no chat template: leave it out.")
        model = load_model(name, chosen)
    started = time.perf_counter()
    bank = calibrate(
        model, tokenizer, config, save_path=save, progress=not as_json, chat=chat, max_disagreement=max_disagreement,
        confidence=confidence, num_prompts=num_prompts,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    path = save or cached_file(bank.fingerprint)
    if as_json:
        print_json({"model": name, "router": path, "seconds": seconds, "num_layers": bank.num_layers, **bank.metadata})
        return
    console().print(checkpoint_table(bank))
    if certificate := bank.metadata.get(CERTIFICATE):
        console().print(sentence_of(certificate), soft_wrap=True)
    console().print(f"routers for {name} in {path}, made in {seconds:.0f} s", markup=False, soft_wrap=True)

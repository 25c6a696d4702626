"""calibrate: from a model and some text to a bank of routers and exit projections, and, if asked for, a promise."""

from __future__ import annotations

import datetime
import itertools
import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from tabulate import tabulate
from torch import nn

from tide_compile.calibration.collect_states import collect_states, forget
from tide_compile.calibration.distil_shortcuts import distil_shortcuts
from tide_compile.calibration.fit_bank import fit_bank
from tide_compile.config import TIDEConfig
from tide_compile.errors import ConfigError
from tide_compile.files import router_cache
from tide_compile.model.decoder import find_decoder
from tide_compile.model.fingerprint import fingerprint
from tide_compile.passes.place_checkpoints import checkpoint_layers
from tide_compile.routers.bank import RouterBank
from tide_compile.routers.lookup import attach
from tide_compile.routers.settings import placed
from tide_compile.text.corpus import Corpus
from tide_compile.thresholds.certify import certify, count_tested
from tide_compile.thresholds.risk_control import check_bound
from tide_compile.thresholds.sweep import sweep_prices

log = logging.getLogger("tide_compile")


def calibrate(
    model: nn.Module,
    tokenizer: object,
    config: TIDEConfig | None = None,
    save_path: str | Path | None = None,
    *,
    dataset: str | Path | Iterable[str] | None = None,
    num_samples: int | None = None,
    max_length: int = 512,
    batch_size: int = 8,
    chat: bool = False,
    max_disagreement: float | None = None,
    confidence: float = 0.95,
    num_prompts: int = 500,
    seed: int = 0,
    progress: bool = True,
) -> RouterBank:
    """Make routers (and exit projections) for a model.

    Runs the model once, uncompiled, over the texts. Memory does not grow with their number: second moments for the
    projections, and a uniform sample of tokens to refine them and to train the routers. Interrupted, it goes on from
    the last shard of 64 texts when it is called again (where the data has a name). Under ``torchrun`` each process
    takes its share of the texts.

    Exit projections are the translators of Belrose et al. (2023), "Eliciting Latent Predictions from Transformers with
    the Tuned Lens"; that routers see how sure the model would be follows Schuster et al. (2022), "Confident Adaptive
    Language Modeling"; a promise is tested as in Angelopoulos et al. (2021), "Learn then Test".

    Args:
        model: a causal language model; it is not changed. It stays attached: ``torch.compile(model, backend="tide")``
            finds the routers.
        tokenizer: its tokenizer.
        config: ``exit_strategy``, ``router_kind``, ``calibration_label``, ``checkpoint_interval``, ``min_layers``, ...
        save_path: router file to write (safetensors); None: the router cache, where the backend looks too.
        dataset: in place of ``config.calibration_dataset``; also a list of strings.
        num_samples: in place of ``config.calibration_samples``.
        max_length: tokens read of each text. batch_size: texts at a time. seed: of sampling and training.
        chat: put texts into the tokenizer's chat template.
        max_disagreement: choose thresholds with the promise that at most this share of the generated tokens differs
            from the full model's choice (``tide_compile.certify``), with this ``confidence``, on ``num_prompts``
            prompts: the beginnings of texts that come after those of the calibration.
        progress: show progress bars.

    Returns:
        The bank; ``bank.metadata["table"]`` has a row per checkpoint, measured on held-out texts.

    Raises:
        CalibrationDataError: the texts cannot be had, or are too few.
        ConfigError: no checkpoint is permitted, or so few prompts cannot keep the promise.
        LayersNotFoundError: the model has no decoder layers.
    """
    config = config or TIDEConfig()
    changes = {
        "calibration_samples": num_samples,
        "calibration_dataset": dataset if isinstance(dataset, str) else None,
    }
    config = placed(replace(config, **{n: v for n, v in changes.items() if v is not None}))
    if max_disagreement is not None:
        check_bound(max_disagreement, confidence, count_tested(num_prompts))
    source = config.calibration_dataset if dataset is None else dataset
    if not isinstance(source, str | Path | list | tuple):
        source = list(itertools.islice(source, config.calibration_samples + num_prompts))  # it is read more than once
    decoder = find_decoder(model)
    layers = checkpoint_layers(len(decoder.layers), config.checkpoint_interval, config.min_layers)
    if not layers:
        raise ConfigError(
            f"checkpoint_interval={config.checkpoint_interval} and min_layers={config.min_layers} leave no checkpoint "
            f"in a model of {len(decoder.layers)} layers: choose smaller ones."
        )
    _join_processes()
    corpus = Corpus(source, model, tokenizer, max_length, chat=chat, seed=seed)
    mark = fingerprint(model.parameters())
    path = Path(save_path) if save_path else router_cache() / f"{mark}.safetensors"
    named = str(source) if isinstance(source, str | Path) else None
    facts = {"data": named or type(source).__name__, "chat": chat, "seed": seed, "max_length": max_length}
    partial = path.with_name(f".{path.name}.partial") if named else None
    watched = tuple(range(layers[0], len(decoder.layers) - 1)) if config.calibrates_shortcuts else layers
    collected = collect_states(
        decoder, corpus, watched, config.calibration_samples,
        moments=() if config.exit_strategy == "identity" else layers,
        batch_size=batch_size, partial=partial, progress=progress,
        signature={
            "model": mark, "layers": [layers, watched], "samples": config.calibration_samples, **facts,
            "versions": corpus.versions(),
        },
    )  # fmt: skip
    if _is_first():
        bank = fit_bank(decoder, layers, collected, config, seed, progress)
        rows = corpus.sample(config.calibration_samples)
        bank.shortcuts = distil_shortcuts(decoder, bank, rows, config.distillation_steps, seed, progress)
        bank.metadata["screen"] = sweep_prices(decoder, bank, config, [row for row in rows if row.held_out] or rows)
        bank.fingerprint = mark
        bank.metadata |= {
            "config": config.to_dict(),
            **facts,
            "texts": collected.rows,
            "tokens": int(collected.train.seen + collected.held_out.seen),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        bank.save(path)
        if max_disagreement is not None:
            prompts = corpus.prompts(num_prompts, config.calibration_samples)
            certify(model, bank, prompts, max_disagreement, confidence, config=config, progress=progress)
            bank.save(path)
        forget(partial)
    if dist.is_initialized():
        dist.barrier()
    if not _is_first():
        bank = RouterBank.load(path)
    attach(model, bank)
    log.info(
        "routers for %d checkpoints saved to %s\n%s",
        len(layers),
        path,
        tabulate(bank.metadata["table"], "keys"),
    )
    return bank


def _join_processes() -> None:
    """Where ``torchrun`` has started several processes, let them know each other."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))  # the first one fits alone


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0

"""calibrate: from a model and some text to a bank of routers and exit projections, and, if asked for, a certificate."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterable
from pathlib import Path

from tabulate import tabulate
from torch import nn

from tide_compile.calibration.collect_states import collect_states
from tide_compile.calibration.distil_shortcuts import distil_shortcuts
from tide_compile.calibration.fit_bank import fit_bank
from tide_compile.calibration.partial_results import forget, tell_kept
from tide_compile.calibration.processes import is_first, join_processes, wait_for_all
from tide_compile.calibration.request import Request, make_request, readable_source, settled_config
from tide_compile.calibration.statistics import Collected
from tide_compile.config import TIDEConfig
from tide_compile.errors import CalibrationDataError
from tide_compile.routers.bank import RouterBank
from tide_compile.routers.lookup import attach
from tide_compile.routers.metadata import SCREEN
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
    projections, and a uniform sample of tokens to distil them and to train the routers. Interrupted, it goes on from
    the last shard of 64 texts when it is called again (where the data has a name): what is done so far is kept in the
    cache folder until the routers are saved, and logged as kept. Under ``torchrun`` each process
    takes its share of the texts.

    Exit projections are the translators of Belrose et al. (2023), "Eliciting Latent Predictions from Transformers with
    the Tuned Lens"; that routers see how sure the model would be follows Schuster et al. (2022), "Confident Adaptive
    Language Modeling"; certificates are those of Angelopoulos et al. (2021), "Learn then Test".

    Args:
        model: a causal language model; it is not changed. It stays attached: ``torch.compile(model, backend="tide")``
            finds the routers.
        tokenizer: its tokenizer.
        config: ``exit_strategy``, ``router_kind``, ``calibration_label``, ``checkpoint_interval``, ``min_layers``, ...
        save_path: router file to write (safetensors, whatever its name); None: the router cache, where the backend
            looks too.
        dataset: in place of ``config.calibration_dataset``; also a list of strings.
        num_samples: in place of ``config.calibration_samples``.
        max_length: tokens read of each text. batch_size: texts at a time. seed: of sampling and training.
        chat: put texts into the tokenizer's chat template.
        max_disagreement: choose thresholds and certify that at most this share of the generated tokens differs from
            the full model's choice (see ``certify``), with this ``confidence``, on ``num_prompts`` prompts: the
            beginnings of texts that come after those of the calibration.
        progress: show progress bars.

    Returns:
        The bank; ``bank.metadata["table"]`` has a row per checkpoint, measured on held-out texts.

    Raises:
        CalibrationDataError: the texts cannot be had, or are too few.
        OutputFileError: the router file cannot be written; known before the model runs, where it can be.
        ConfigError: no checkpoint is permitted, or so few prompts cannot certify the bound.
        LayersNotFoundError: the model has no decoder layers.
    """
    config = settled_config(config, dataset, num_samples)
    if max_disagreement is not None:
        check_bound(max_disagreement, confidence, count_tested(num_prompts))
    source = readable_source(config, dataset, num_prompts)
    corpus = Corpus(source, model, tokenizer, max_length, chat=chat, seed=seed)
    request = make_request(config, corpus, save_path)
    available = corpus.check(request.limit, 0 if max_disagreement is None else num_prompts)
    if max_disagreement is not None:
        check_bound(max_disagreement, confidence, count_tested(available))
    join_processes()
    try:
        collected = collect_states(request, batch_size, progress)
        if is_first():
            bank = _fit(request, collected, progress)
            bank.save(request.path)
            if max_disagreement is not None:
                prompts = corpus.prompts(num_prompts, request.limit)
                certify(model, bank, prompts, max_disagreement, confidence, config=config, progress=progress)
                bank.save(request.path)
    except CalibrationDataError:
        forget(request.partial)  # the same texts would not do a second time
        raise
    except BaseException:
        if is_first():
            tell_kept(request.partial)
        raise
    if is_first():
        forget(request.partial)
    wait_for_all()
    if not is_first():
        bank = RouterBank.load(request.path)
    attach(model, bank)
    log.info("routers for %d checkpoints saved to %s", len(request.layers), request.path)
    log.debug("%s", tabulate(bank.metadata["table"], "keys"))
    return bank


def _fit(request: Request, collected: Collected, progress: bool) -> RouterBank:
    """Everything but thresholds, from the states of all texts and some of the texts themselves."""
    decoder, config, seed = request.decoder, request.config, request.corpus.seed
    bank = fit_bank(decoder, request.layers, collected, config, seed, progress)
    bank.fingerprint = request.fingerprint
    rows = request.corpus.sample(request.limit)
    bank.shortcuts = distil_shortcuts(decoder, bank, rows, config.distillation_steps, seed, progress)
    held_out = [row for row in rows if row.held_out]
    bank.metadata[SCREEN] = sweep_prices(decoder, bank, config, held_out or rows)
    bank.metadata |= {
        "config": config.to_dict(),
        **request.facts,
        "texts": collected.rows,
        "tokens": int(collected.train.seen + collected.held_out.seen),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return bank

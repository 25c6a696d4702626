"""request: what a calibration was asked for, with everything settled that can be before a text is read."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from tide_compile.config import TIDEConfig
from tide_compile.errors import ConfigError, OutputFileError
from tide_compile.files import calibration_cache, check_writable, user_path
from tide_compile.model.decoder import Decoder, find_decoder
from tide_compile.model.fingerprint import fingerprint
from tide_compile.passes.place_checkpoints import checkpoint_layers
from tide_compile.routers.lookup import cached_file
from tide_compile.routers.metadata import Metadata
from tide_compile.routers.settings import placed
from tide_compile.text.corpus import Corpus

Source = str | Path | Iterable[str]


@dataclass(frozen=True, slots=True)
class Request:
    """A calibration to be done.

    Attributes:
        config: with the number of texts and the places of checkpoints settled.
        decoder: of the model.
        corpus: where the texts come from.
        layers: that the C checkpoints are behind.
        watched: whose states are kept: ``layers``, or, for shortcuts, all from the first checkpoint on but the last.
        fingerprint: of the model's weights.
        path: the router file to be written.
        partial: beginning of the name of the files that hold what is done so far; None where the data has no name that
            would tell it apart from other data.
        facts: about the texts, for the router file.
    """

    config: TIDEConfig
    decoder: Decoder
    corpus: Corpus
    layers: tuple[int, ...]
    watched: tuple[int, ...]
    fingerprint: str
    path: Path
    partial: Path | None
    facts: Metadata

    @property
    def limit(self) -> int:
        """Rows to be read at most."""
        return self.config.calibration_samples

    def signature(self) -> dict[str, object]:
        """What has to be the same for an interrupted calibration to go on, as it is now: files may be written anew."""
        return {
            "model": self.fingerprint, "layers": [self.layers, self.watched], "samples": self.limit, **self.facts,
            "versions": self.corpus.versions(),
        }  # fmt: skip


def settled_config(config: TIDEConfig | None, dataset: Source | None, num_samples: int | None) -> TIDEConfig:
    """The config with what was given beside it, and with numbers for the places of checkpoints."""
    changes = {
        "calibration_samples": num_samples,
        "calibration_dataset": dataset if isinstance(dataset, str) else None,
    }
    return placed(replace(config or TIDEConfig(), **{n: v for n, v in changes.items() if v is not None}))


def readable_source(config: TIDEConfig, dataset: Source | None, num_prompts: int) -> Source:
    """What the texts are read from, more than once: of an iterator, as many as are needed."""
    source = config.calibration_dataset if dataset is None else dataset
    if isinstance(source, str | Path | list | tuple):
        return source
    return list(itertools.islice(source, config.calibration_samples + num_prompts))


def make_request(config: TIDEConfig, corpus: Corpus, save_path: str | Path | None) -> Request:
    """Find the decoder, the places of checkpoints and the files.

    Raises:
        ConfigError: no checkpoint is permitted.
        LayersNotFoundError: the model has no decoder layers.
        OutputFileError: the router file cannot be written.
    """
    decoder = find_decoder(corpus.model)
    layers = checkpoint_layers(len(decoder.layers), config.checkpoint_interval, config.min_layers)
    if not layers:
        raise ConfigError(
            f"checkpoint_interval={config.checkpoint_interval} and min_layers={config.min_layers} leave no checkpoint "
            f"in a model of {len(decoder.layers)} layers: choose smaller ones."
        )
    watched = tuple(range(layers[0], len(decoder.layers) - 1)) if config.calibrates_shortcuts else layers
    mark = fingerprint(corpus.model.parameters())
    path = user_path(save_path) if save_path else cached_file(mark)
    try:
        check_writable(path, _size(config, decoder, layers, watched))
    except OutputFileError as error:
        if save_path:
            raise
        raise OutputFileError(f"{error} Give save_path, or set TIDE_CACHE to another folder.") from error
    named = str(corpus.source) if isinstance(corpus.source, str | Path) else None
    told_apart = hashlib.sha256(f"{mark} {os.path.realpath(path)}".encode(errors="surrogateescape")).hexdigest()[:16]
    partial = calibration_cache() / told_apart if named else None
    facts: Metadata = {
        "data": named or type(corpus.source).__name__,
        "chat": corpus.chat,
        "seed": corpus.seed,
        "max_length": corpus.max_length,
    }
    return Request(config, decoder, corpus, layers, watched, mark, path, partial, facts)


def _size(config: TIDEConfig, decoder: Decoder, layers: tuple[int, ...], watched: tuple[int, ...]) -> int:
    """Bytes of the router file, roughly and rather too many: maps of exits, routers with probes, shortcuts, in fp32."""
    hidden = decoder.hidden_dim
    exits = 0 if config.exit_strategy == "identity" else hidden * hidden
    routers = config.router_bottleneck_dim * hidden
    if config.router_kind == "probe":
        routers += config.probe_rank * (hidden + config.probe_vocabulary)
    shortcuts = 2 * config.projection_rank * hidden * len(watched) if config.calibrates_shortcuts else 0
    return 4 * (len(layers) * (exits + routers) + shortcuts) + (1 << 16)

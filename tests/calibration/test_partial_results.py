"""What an interrupted calibration leaves: where, how much, for how long; and what is known before the model runs."""

import logging
import os
import time

import pytest
import torch

from tests.support.calibration import CONFIG, Characters, run, texts
from tests.support.models import tiny
from tide_compile.calibration.collect_states import TOKENS
from tide_compile.errors import CalibrationDataError, ConfigError, OutputFileError
from tide_compile.files import calibration_cache
from tide_compile.text import corpus as corpus_module


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(texts(40, 120)))
    return path


def interrupted(file, monkeypatch, after=3, **kwargs):
    """A calibration that the user ends after so many shards of 8 rows."""
    monkeypatch.setattr(corpus_module, "SHARD", 8)
    calls, original = [], Characters.__call__

    def failing(self, batch, **options):
        calls.append(batch)
        if len(calls) > after:
            raise KeyboardInterrupt
        return original(self, batch, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Characters, "__call__", failing)
        run(tiny("rmsnorm-rope-gqa"), str(file), num_samples=40, **kwargs)


def test_where_and_how_much(file, tmp_path, monkeypatch, caplog):
    """Catches files beside the user's, a silent one, and one that holds the places of tokens that were never read."""
    folder = tmp_path / "out"
    with caplog.at_level(logging.INFO, "tide_compile"):
        interrupted(file, monkeypatch, save_path=folder / "r.safetensors")
    (kept,) = calibration_cache().iterdir()
    assert not folder.exists() and str(kept) in caplog.messages[0] and f"goes on from {kept}" in caplog.messages[-1]
    assert kept.stat().st_size < TOKENS * 3 * 64 * 4 / 4  # of a whole sample: 15 MB
    run(tiny("rmsnorm-rope-gqa"), str(file), num_samples=40, save_path=folder / "r.safetensors")
    assert list(calibration_cache().iterdir()) == [] and os.listdir(folder) == ["r.safetensors"]


def test_what_is_of_no_use_is_deleted(file, tmp_path, monkeypatch, caplog):
    """That of other settings, of texts that are too few, and what nobody came back to."""
    interrupted(file, monkeypatch, save_path=tmp_path / "r")
    (kept,) = calibration_cache().iterdir()
    before = kept.stat().st_mtime_ns
    old = calibration_cache() / "0123.0-of-1"
    old.touch()
    os.utime(old, (0, time.time() - 31 * 86_400))
    interrupted(file, monkeypatch, save_path=tmp_path / "r", chat=False, seed=1)
    assert "started anew" in caplog.text and not old.exists() and kept.stat().st_mtime_ns != before
    file.write_text("\n\n".join(texts(3, 120)))
    with pytest.raises(CalibrationDataError, match="at least five"):
        run(tiny("rmsnorm-rope-gqa"), str(file), num_samples=40, save_path=tmp_path / "r")
    assert list(calibration_cache().iterdir()) == []


def test_a_cache_that_cannot_be_written(file, tmp_path, monkeypatch, caplog):
    """The work is done, and one line says that it could not go on. Without a file to save to it ends before it
    begins, and says what can be given."""
    monkeypatch.setattr(corpus_module, "SHARD", 8)
    monkeypatch.setenv("TIDE_CACHE", str(file / "cache"))
    with caplog.at_level(logging.WARNING, "tide_compile"):
        run(tiny("rmsnorm-rope-gqa"), str(file), num_samples=40, save_path=tmp_path / "r")
    assert (tmp_path / "r").is_file()
    assert len([m for m in caplog.messages if "will not go on where it was" in m]) == 1
    with pytest.raises(OutputFileError, match="Give save_path, or set TIDE_CACHE"):
        run(tiny("rmsnorm-rope-gqa"), str(file), num_samples=40)


def test_known_before_the_model_runs(file, tmp_path, monkeypatch):
    """Catches each of these after an hour of work: where to save, a text of another encoding, too few prompts."""
    model = tiny("rmsnorm-rope-gqa")
    forward = model.forward

    def failing(input_ids, **kwargs):
        assert input_ids.numel() == 1  # which shows the layers
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", failing)
    with pytest.raises(OutputFileError, match="it is a folder"):
        run(model, str(file), save_path=tmp_path)
    with pytest.raises(ConfigError, match="17 prompts to test with cannot certify"):
        run(model, str(file), num_samples=20, save_path=tmp_path / "r", max_disagreement=0.05)
    with file.open("ab") as end:
        end.write("\n\né".encode("latin-1"))
    with pytest.raises(CalibrationDataError, match="is not in UTF-8"):
        run(model, f"self+{file}", config=CONFIG, save_path=tmp_path / "r")
    assert not (tmp_path / "r").exists() and torch.is_grad_enabled()

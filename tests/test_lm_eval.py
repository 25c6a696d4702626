"""The harness's model ``tide`` against ``hf`` and the eager reference, on tiny models with uncompiled pieces."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.models import HIDDEN, LAYERS, SETTINGS, tiny
from tests.support.tokenizers import save_tiny, word_tokenizer
from tide_compile import RouterBank, TIDEConfig, eager_reference
from tide_compile.errors import ConfigError, MissingExtraError, NoRouterError

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402 (after the question whether it is there)
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from tide_compile.lm_eval_model import TideLM  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TASKS = ROOT / "examples" / "lm_eval"
STOP = {"until": ["w5"], "max_gen_toks": 5}
# context and answer; `?` is token 0, which the harness also pads with
CLEAR = [("w2 w3 w4 w5 w6 w7", " w8 w9"), ("w3 ?", " w3"), ("", "w7"), ("w9 w8 w7 w6", " w2")]
UNCLEAR = [("w2", " w3"), ("w2 ?", " w3"), ("w2 ? ?", " ? w9"), ("? ?", " ?")]  # padded, one may be another
TOKENS = 7 + 2 + 1 + 4  # that the model reads of CLEAR
READ = ["w9 w8 w7 w6", "w3 ? ?", "w4", "w8 w2"]
CONTINUED = ["w2 w3 w4", "w9 w3", "w7 w7 w7 w7 w7", "w8 w2"]


def requests(kind, arguments):
    return [Instance(kind, {}, values, i) for i, values in enumerate(arguments)]


def scores(lm, pairs):
    return lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)


def answers(lm):
    """To the three kinds of request: what is a number, and what is not."""
    numbers, greedy = zip(*scores(lm, CLEAR + UNCLEAR), strict=True)
    rolling = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in READ]))
    texts = lm.generate_until(requests("generate_until", [(text, STOP) for text in CONTINUED]))
    return torch.tensor([*numbers, *rolling]), (greedy, texts)


def assert_same(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-4)
    assert got[1] == want[1]


@pytest.mark.parametrize(("name", "threshold"), [("rmsnorm-rope-gqa", 0.5), ("layernorm-learned-positions", 0.0)])
def test_equals_the_reference(name, threshold):
    """Alone and in batches, which the harness pads on the right without a mask. Catches padding that is counted, a
    token of a text that is taken for padding, and calls that go past the engine."""
    model, tokenizer = tiny(name), word_tokenizer()
    bank = RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    config = TIDEConfig(exit_threshold=threshold, **SETTINGS)
    common = {"tokenizer": tokenizer, "max_length": 32}
    with eager_reference(model, bank, config) as reference:
        one = HFLM(model, batch_size=1, **common)
        scores(one, CLEAR)
        left = torch.cat([layers.flatten() for layers in reference.exit_layers])
        want = answers(one)
        assert_same(answers(HFLM(model, batch_size=4, **common)), want)
    for batch in (1, 4):
        lm = TideLM(model, bank, batch_size=batch, exit_threshold=threshold, **SETTINGS, **common)
        scores(lm, CLEAR)
        stats = lm.engine.stats
        assert stats.total_tokens == len(left) == TOKENS
        assert stats.exits_per_layer == {i: n for i in range(LAYERS - 1) if (n := int((left == i).sum()))}
        assert_same(answers(lm), want)
        assert lm.get_model_info()["tide"]["tokens"] == lm.engine.stats.total_tokens > TOKENS
    assert stats.exit_rate > 0 and (threshold > 0 or stats.exit_rate == 1)


def test_automatic_batch_size(model, bank):
    """What is run to find it is not counted."""
    common = {"tokenizer": word_tokenizer(), "max_length": 16, "batch_size": "auto", "max_batch_size": 4}
    lm = TideLM(model, bank, exit_threshold=0, **SETTINGS, **common)
    scores(lm, CLEAR)
    assert lm.engine.stats.total_tokens == TOKENS and lm.batch_sizes == {0: 4}


def test_tasks_equal_hf(tmp_path):
    """The example's tasks through the harness, by the names of files, without exits: its own model's answers."""
    folder = str(save_tiny(tmp_path, layers=2))
    results = {}
    for name, options in {"hf": {"device": "cpu"}, "tide": {"exit_threshold": 1, "lowering": "eager"}}.items():
        results[name] = lm_eval.simple_evaluate(
            name,
            {"pretrained": folder, "dtype": "float32", **options},
            tasks=["pydoc_continuations", "sums"],
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
            limit=4,
            batch_size=2,
            bootstrap_iters=0,
        )
    assert results["tide"]["results"] == results["hf"]["results"]
    for task, samples in results["hf"]["samples"].items():
        for got, want in zip(results["tide"]["samples"][task], samples, strict=True):
            assert got["doc"] == want["doc"]
            for ours, theirs in zip(flat(got["resps"]), flat(want["resps"]), strict=True):
                assert ours == (pytest.approx(theirs, rel=1e-4) if isinstance(theirs, float) else theirs)
    assert results["tide"]["config"]["tide"]["layers_saved"] == 0


def flat(nested):
    return [x for part in nested for x in flat(part)] if isinstance(nested, list | tuple) else [nested]


def test_command_line(tmp_path):
    """``python -m``, a router file, and the exits in the log and in the results."""
    model, bank = save_tiny(tmp_path / "model", layers=2), tmp_path / "router.safetensors"
    RouterBank.untrained(HIDDEN, 2, bottleneck_dim=16).save(bank)
    options = f"pretrained={model},router={bank},exit_threshold=0,min_layers=1,checkpoint_interval=1,lowering=eager"
    command = [sys.executable, "-m", "tide_compile.lm_eval_model", "--model", "tide", "--model_args", options]
    command += ["--include_path", str(TASKS), "--tasks", "sums", "--limit", "2", "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "Mean depth: 1.0 of 2 layers, 50.0% saved" in done.stderr and "|sums|" in done.stdout.replace(" ", "")
    (written,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(written.read_text())["config"]["tide"]["mean_depth"] == 1


def test_what_cannot_be_had(model, tmp_path):
    tokenizer = word_tokenizer()
    with pytest.raises(NoRouterError, match="router=FILE, or exit_threshold=1"):
        TideLM(model, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="no model at"):
        TideLM(str(tmp_path / "none.gguf"))
    with pytest.raises(ConfigError, match="exit_threshold=2"):
        TideLM(model, tokenizer=tokenizer, exit_threshold=2)
    with pytest.raises(ConfigError, match="parallelize=True"):
        TideLM(model, tokenizer=tokenizer, parallelize=True)
    with pytest.raises(ConfigError, match="backend='seq2seq'"):
        TideLM(model, tokenizer=tokenizer, backend="seq2seq")


def test_without_the_harness(monkeypatch):
    for name in ("lm_eval", "lm_eval.__main__"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "tide_compile.lm_eval_model")
    with pytest.raises(MissingExtraError, match="pip install 'tide-compile\\[eval\\]'"):
        importlib.import_module("tide_compile.lm_eval_model")

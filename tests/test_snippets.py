"""What the pages print runs as printed: Python on a tiny model, commands as far as their arguments, names."""

import re
import shlex
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from click.testing import CliRunner as ClickRunner
from typer.main import get_command

import tide_compile as TIDE
from tests.support.models import HIDDEN, prompt, tiny
from tests.support.tokenizers import byte_tokenizer
from tide_compile import RouterBank, TIDEConfig
from tide_compile.cli.main import app
from tide_compile.torch_internals.switches import TRICKS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SMALLER = {  # of a model and of texts that take a moment
    "num_samples=500": "num_samples=20",
    "num_prompts=500": "num_prompts=90",
    "max_new_tokens=128": "max_new_tokens=8",
    "{19: 0.9, 23: 0.8}": "{0: 0.9, 1: 0.8}",
}
DEPTH = 3
FAST = {
    "min_layers": 1, "checkpoint_interval": 1, "lowering": "eager", "calibration_samples": 20, "distillation_steps": 4,
    "router_bottleneck_dim": 8, "probe_rank": 8, "probe_vocabulary": 16, "projection_rank": 4,
}  # fmt: skip


def blocks(language):
    """Of all pages, as parameters."""
    found = []
    for page in PAGES:
        for number, text in enumerate(re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)):
            found.append(pytest.param(text, id=f"{page.stem}-{number}"))
    return found


def new_model(*args, **kwargs):
    return tiny("rmsnorm-rope-gqa", layers=DEPTH)


@pytest.fixture
def names(monkeypatch, tmp_path):
    """What a snippet finds: the model and inputs of the text around it, and a router file."""
    monkeypatch.chdir(tmp_path)
    defaults = {f.name: getattr(TIDEConfig(), f.name) for f in fields(TIDEConfig)} | FAST
    monkeypatch.setattr(TIDEConfig.__init__, "__defaults__", tuple(defaults.values()))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", new_model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_: byte_tokenizer())
    rows = [{"text": f"{i} is a text for {i * i}. " * 9} for i in range(120)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    (tmp_path / "texts.txt").write_text("\n\n".join(row["text"] * (i % 3 + 1) for i, row in enumerate(rows)))
    bank = RouterBank.untrained(HIDDEN, DEPTH, bottleneck_dim=8)
    bank.save("router.safetensors")
    model, (ids, mask) = new_model(), prompt(1)
    compiled = torch.compile(new_model(), backend="tide", options={"router": bank})
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {
        "TIDE": TIDE, "torch": torch, "model": model, "tokenizer": byte_tokenizer(), "inputs": inputs, "input_ids": ids,
        "engine": TIDE.TIDE(new_model(), bank), "compiled": compiled,
    }  # fmt: skip


@pytest.mark.parametrize("text", blocks("python"))
def test_python(names, text):
    """Catches a name that has changed, an argument that is gone, a call that fails."""
    for printed, less in SMALLER.items():
        text = text.replace(printed, less)
    before = names["model"].state_dict()
    exec(compile(text, "snippet", "exec"), names)
    assert all(torch.equal(v, before[n]) for n, v in names["model"].state_dict().items())
    if "out" in names:
        assert names["out"].shape[1] > 0


def commands():
    for page in PAGES:
        for text in re.findall(r"^```\n(.*?)^```$", page.read_text(), re.M | re.S):
            for line in text.replace("\\\n", " ").splitlines():
                line = line.removeprefix("$ ").partition("  #")[0].strip()
                if re.match(r"(tide|make|python|pip) ", line) and not re.search(r"tide [a-z]+,", line):
                    yield pytest.param(line, id=f"{page.stem}: {line[:60]}")


@pytest.mark.parametrize("line", commands())
def test_commands(line):
    """Catches an option, a command, a module or a target that is not there any more."""
    program, *words = shlex.split(re.split(r" [>|&]", line)[0])
    if program == "tide":
        context = get_command(app).make_context("tide", list(words), resilient_parsing=True)
        name, command, rest = get_command(app).resolve_command(context, list(words))
        shown = ClickRunner().invoke(command, ["--help"]).output
        assert name and shown
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        allowed = command.context_settings.get("ignore_unknown_options", False)
        assert allowed or {w.partition("=")[0] for w in rest if w.startswith("-")} <= known
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {w for w in words if "=" not in w} <= set(targets)
    elif program == "python" and words[0] == "-m":
        assert find_spec(words[1]) is not None
    elif program == "python":
        assert words[0].startswith("-") or (ROOT / words[0]).is_file()


def table(page, title):
    """The first column of the table below a title, without code marks, a name each."""
    text = (ROOT / "docs" / page).read_text().split(title, 1)[1]
    rows = re.search(r"(^\|.*\|\n)+", text, re.M).group().splitlines()[2:]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def test_options_are_all_there():
    """Catches an option that no page tells of, and one that is gone."""
    ours = {f.name for f in fields(TIDEConfig)} | {"router", "mode", "dump"}
    assert set(table("options.md", "# Options")) == ours


def test_switches_are_all_there():
    assert set(table("options.md", "## Switches")) == set(TRICKS)


def test_environment_variables():
    """Catches a variable that nothing reads."""
    sources = "\n".join(
        path.read_text() for folder in ("tide_compile", "passes", "kernels") for path in (ROOT / folder).rglob("*.py")
    )
    for name in table("options.md", "## Environment variables"):
        assert name.partition("=")[0] in sources or not name.startswith("TIDE"), name


class TestReference:
    """What the README of tide-inference 0.2.1 shows, by its names: only the import is another one."""

    def test_calibrate_and_generate(self, names):
        """Catches the reference's quick start that ends in an error: a path with its suffix, arguments by name."""
        model, tokenizer = names["model"], names["tokenizer"]
        TIDE.calibrate(model, tokenizer, save_path="router.pt")
        for engine in (
            TIDE.TIDE(model, router_path="router.pt"),
            TIDE.TIDE(model, "router.pt"),
            TIDE.TIDE(model, "router.pt", config=TIDEConfig(exit_threshold=0.5)),
            TIDE.TIDE(model, "router.pt", config=TIDEConfig(exit_threshold=0.85, min_layers=2)),
        ):
            ids = tokenizer("Hello", return_tensors="pt").input_ids
            output = engine.generate(ids, max_new_tokens=5, temperature=0)
            assert isinstance(tokenizer.decode(output[0]), str)
        stats = engine.last_stats
        assert stats.summary().startswith(f"Total tokens: {stats.total_tokens}, Exited: {stats.total_exited} (")
        assert "Ran all layers: " in stats.summary()
        assert 0 <= stats.exit_rate <= 1 and sum(stats.exits_per_layer.values()) == stats.total_exited
        assert TIDE.TIDE.calibrate(model, tokenizer, save_path="router.pt").layers

    def test_config(self):
        """Its names, with values that it has as defaults; ours are others where the calibrated routers know better."""
        from tide_compile import TIDEConfig

        config = TIDEConfig(
            exit_threshold=0.85, min_layers=8, checkpoint_interval=4, calibration_samples=2000,
            calibration_dataset="wikitext", convergence_threshold=0.98, router_bottleneck_dim=128,
            exit_strategy="identity", kv_cache_strategy="zero_pad", compaction_threshold=0.25,
        )  # fmt: skip
        same = replace(
            config, exit_threshold=None, min_layers=None, checkpoint_interval=None, exit_strategy="auto",
            kv_cache_strategy="auto",
        )  # fmt: skip
        assert same == TIDEConfig()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, names, dtype):
        """Routers of one dtype are those of the others."""
        model = tiny("rmsnorm-rope-gqa", dtype, layers=DEPTH)
        assert TIDE.TIDE(model, "router.safetensors").generate(prompt(1)[0], max_new_tokens=3).shape[1] == 12

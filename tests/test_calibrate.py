"""Calibration: what it learns, what it reads, what it costs."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import tide_compile
from tests.support.models import CONFIGS, HIDDEN, LAYERS, VOCABULARY, prompt, tiny
from tide_compile import RouterBank, TIDEConfig, calibrate
from tide_compile.calibration.fit_maps import fit_affine
from tide_compile.calibration.statistics import Gram, Reservoir
from tide_compile.calibration.train_routers import train_router
from tide_compile.errors import CalibrationDataError, ConfigError, LayersNotFoundError
from tide_compile.kernels.route import normalise_reference
from tide_compile.model.decoder import find_decoder
from tide_compile.model.norm import fit_norm_maybe
from tide_compile.routers.networks import TokenRouter
from tide_compile.text.sources import calibration_texts

CONFIG = TIDEConfig(checkpoint_interval=1, min_layers=1, router_bottleneck_dim=8, distillation_steps=8)


class Characters:
    """A tokenizer for tiny models: a character is a token."""

    bos_token_id = eos_token_id = None

    def __call__(self, texts, truncation=True, max_length=64):
        return {"input_ids": [[ord(c) % VOCABULARY for c in text][:max_length] for text in texts]}


def texts(number, length=40):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(97, 122, (number, length), generator=generator).tolist()
    return ["".join(map(chr, row)) for row in rows]


def run(model, source, **kwargs):
    return calibrate(model, Characters(), kwargs.pop("config", CONFIG), dataset=source, progress=False, **kwargs)


def test_calibrated_model_compiles(tmp_path):
    """From text to skipped layers: the file, the attachment, the table."""
    model = tiny("rmsnorm-rope-gqa")
    path = tmp_path / "r.safetensors"
    bank = run(model, texts(20), save_path=path)
    assert bank.layers == [0, 1, 2] and sorted(bank.projections) == [0, 1, 2]
    loaded = RouterBank.load(path)
    assert loaded.fingerprint == bank.fingerprint and loaded.metadata["texts"] == 20
    table = loaded.metadata["table"]
    assert [row["layer"] for row in table] == [0, 1, 2]
    options = {"exit_threshold": 0.0, "min_layers": 1, "checkpoint_interval": 1, "lowering": "eager"}
    with torch.no_grad(), tide_compile.record_exits() as stats:
        torch.compile(model, backend="tide", options=options)(prompt(2)[0], use_cache=False)
    assert stats.exit_rate == 1


def test_agreement_is_measured_as_the_reference_does_it():
    """Catches a projection fitted or applied transposed, or labels of the wrong token: on held-out text, the table's
    agreement must be what the eager reference really delivers."""
    model = tiny("rmsnorm-rope-gqa")
    source = texts(100)
    bank = run(model, source, config=TIDEConfig(checkpoint_interval=3, min_layers=1, router_bottleneck_dim=8))
    (row,) = bank.metadata["table"]
    config = TIDEConfig(checkpoint_interval=3, min_layers=1, exit_threshold=0.0)
    held_out = torch.tensor(Characters()(source[4::5])["input_ids"])
    with torch.no_grad():
        want = model(held_out).logits.argmax(-1)
        decoder = find_decoder(model)
        states = {}
        with decoder.on_layers(lambda i, _, h: states.__setitem__(i, h)):
            model(held_out)
        got = decoder.logits(bank.projections[2](states[2]).flatten(0, 1)).argmax(-1)
        with tide_compile.eager_reference(model, bank, config):
            forced = model(held_out[:1]).logits.argmax(-1)
    agreement = (got == want.flatten()).float().mean().item()
    assert row["top-1 agreement"] == pytest.approx(agreement, abs=0.002)
    assert torch.equal(forced[0], got.view_as(want)[0])
    assert agreement > 1.5 / VOCABULARY


def test_cosine_label_and_identity():
    """The reference's recipe: states that do not change from layer 1 on have all converged there."""
    model = tiny("rmsnorm-rope-gqa")
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    config = TIDEConfig(
        checkpoint_interval=1, min_layers=1, exit_strategy="identity", calibration_label="cosine", router_kind="mlp",
        router_bottleneck_dim=8,
    )  # fmt: skip
    bank = run(model, texts(20), config=config)
    rates = {row["layer"]: row["label rate"] for row in bank.metadata["table"]}
    assert rates[1] == rates[2] == 1 and rates[0] < 1
    assert not bank.projections and bank.exit_strategy == "identity"


@pytest.mark.parametrize("name", CONFIGS)
def test_decoder_is_found(name):
    """Layers, norm and head of every architecture: the head must repeat the model's own logits."""
    model = tiny(name)
    decoder = find_decoder(model)
    assert len(decoder.layers) == LAYERS and decoder.hidden_dim == HIDDEN
    states = {}
    ids, _ = prompt(1)
    with torch.no_grad(), decoder.on_layers(lambda i, _, h: states.__setitem__(i, h)):
        want = model(ids).logits
    assert torch.allclose(decoder.logits(states[LAYERS - 1][0]), want[0], atol=1e-6)
    norm = decoder.final_norm()
    h = torch.randn(5, HIDDEN)
    ours = normalise_reference(h, norm.weight, norm.bias, norm.eps, norm.layer_norm)
    assert torch.allclose(ours, decoder.norm(h), atol=1e-4)


def test_decoder_not_found():
    with pytest.raises(LayersNotFoundError):
        find_decoder(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("module", "layer_norm", "bias"),
    [(nn.RMSNorm(64, eps=1e-5), False, False), (nn.LayerNorm(64, eps=1e-6), True, True)],
)
def test_norms_are_recognised(module, layer_norm, bias):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.rand(64, generator=generator) + 0.5
    norm = fit_norm_maybe(module, 64, torch.float32, torch.device("cpu"))
    assert norm.layer_norm == layer_norm and (norm.bias is not None) == bias
    assert torch.allclose(norm.weight, module.weight, atol=1e-3)
    assert norm.eps == pytest.approx(module.eps, rel=0.2)


def test_what_is_no_norm():
    assert fit_norm_maybe(nn.Tanh(), 64, torch.float32, torch.device("cpu")) is None


def test_ridge_finds_a_linear_map():
    """Catches a transposed map or a lost bias; in directions without data it must stay the identity."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(8, 8, generator=generator), torch.randn(8, generator=generator)
    gram = Gram(8, torch.device("cpu"))
    for _ in range(20):
        x = torch.randn(50, 8, generator=generator) + 2
        gram.add(x, x @ weight.T + bias)
    found = fit_affine(gram, x, x @ weight.T + bias)
    assert torch.allclose(found[0], weight, atol=1e-2) and torch.allclose(found[1], bias, atol=1e-1)
    poor = Gram(8, torch.device("cpu"))
    x[:, 4:] = 0
    poor.add(x, x @ weight.T)
    assert torch.allclose(poor.ridge(0.1)[0][:, 4:], torch.eye(8)[:, 4:], atol=1e-3)


def test_reservoir_is_uniform():
    """Every tenth of the stream is equally likely to be kept (60 draws of 100; five sigma)."""
    counts = torch.zeros(10)
    for seed in range(60):
        reservoir, dice = Reservoir(100, 1, 1, torch.float32), torch.Generator().manual_seed(seed)
        for chunk in torch.arange(1000.0).view(-1, 1, 1).split(37):
            reservoir.add(chunk, dice)
        counts += torch.histc(reservoir.at(0), 10, 0, 1000)
    assert (counts - 600).abs().max() < 5 * 600**0.5


def test_router_learns_and_repeats():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2100, 16, generator=generator)
    y = (x[:, 0] > 0).float()
    routers = []
    for _ in range(2):
        torch.manual_seed(4)
        routers.append(train_router(TokenRouter(16, 8), (x[:2000], y[:2000]), (x[2000:], y[2000:]), seed=4))
    first, second = routers
    assert ((first(x[2000:]) > 0.5) == (y[2000:] > 0.5)).float().mean() > 0.9
    assert torch.equal(first.down.weight, second.down.weight)


def test_texts(tmp_path):
    assert len(list(calibration_texts("pydoc", 7))) == 7
    assert list(calibration_texts(["a", "", "b", "c"], 2)) == ["a", "b"]
    long = "words " * 30
    (tmp_path / "t.txt").write_text(f"{long}\n\nshort\n\n" + "wrapped at a few columns\n" * 6)
    assert [len(t) for t in calibration_texts(str(tmp_path / "t.txt"), 9)] == [len(long.strip()), 6 * 25 - 1]
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": long}) + "\n")
    assert list(calibration_texts(tmp_path / "t.jsonl", 9)) == [long.strip()]
    (tmp_path / "u.jsonl").write_text(json.dumps({"body": long}) + "\n")
    for bad, why in (
        (tmp_path / "none.txt", "no calibration file"),
        (str(tmp_path / "u.jsonl"), "none is called 'text'"),
        ([], "holds no text"),
        ("wikitext", "cannot be read"),  # no hub is reachable in the tests
    ):
        with pytest.raises(CalibrationDataError, match=f"{why}.*pydoc"):
            list(calibration_texts(bad, 5))


def test_too_little():
    with pytest.raises(CalibrationDataError, match="at least five"):
        run(tiny("rmsnorm-rope-gqa"), texts(3))
    with pytest.raises(ConfigError, match="checkpoint_interval=9"):
        run(tiny("rmsnorm-rope-gqa"), texts(10), config=TIDEConfig(checkpoint_interval=9))


def test_memory_does_not_grow_with_the_texts():
    """Twelve times the texts, the same peak (within 10 %): states are summed or sampled, never collected."""
    program = """
import resource, sys
sys.path.insert(0, {root!r})
from tests.test_calibrate import run, texts, tiny
from tide_compile.calibration import collect_states
collect_states.TOKENS = 1024  # the sample is full in both runs
number = int(sys.argv[1])
run(tiny("rmsnorm-rope-gqa"), (t for _ in range(number) for t in texts(10, 64)), num_samples=10 * number)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    root = __file__.rsplit("/", 2)[0]
    peaks = [
        int(subprocess.check_output([sys.executable, "-c", program.format(root=root), n], text=True).split()[-1])
        for n in ("10", "120")
    ]
    assert peaks[1] < 1.1 * peaks[0]

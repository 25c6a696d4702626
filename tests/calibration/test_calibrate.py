"""Calibration: what it learns, what it reads, what it costs."""

import subprocess
import sys

import pytest
import torch

import tide_compile
from tests.support.calibration import Characters, run, texts
from tests.support.models import VOCABULARY, prompt, tiny
from tide_compile import RouterBank, TIDEConfig
from tide_compile.errors import CalibrationDataError, ConfigError
from tide_compile.model.decoder import find_decoder


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
from tests.support.calibration import run, texts
from tests.support.models import tiny
from tide_compile.calibration import collect_states
collect_states.TOKENS = 1024  # the sample is full in both runs
number = int(sys.argv[1])
run(tiny("rmsnorm-rope-gqa"), (t for _ in range(number) for t in texts(10, 64)), num_samples=10 * number)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    root = __file__.rsplit("/", 3)[0]
    peaks = [
        int(subprocess.check_output([sys.executable, "-c", program.format(root=root), n], text=True).split()[-1])
        for n in ("10", "120")
    ]
    assert peaks[1] < 1.1 * peaks[0]

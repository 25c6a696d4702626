"""The examples run, on a tiny model in a folder and with uncompiled pieces; the server also as a process."""

import os
import re
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from tests.support.tokenizers import save_tiny
from tide_compile import backend
from tide_compile.calibration import calibrate
from tide_compile.lowering.lower import lower

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RUN = [
    ("quickstart.py", ["--threshold", "0"], ["Exited: 3[0-9] \\(100.0%\\)", "Layer 7"]),
    ("any_model.py", ["--interval", "3", "--threshold", "0.3", "--router", "{}/any.safetensors"],
     ["9 layers at model.layers", "Calls: 3"]),
    ("tune_threshold.py", ["--thresholds", "0"], ["\n1.0 +0% +0% +100.0%", "\n0.0 +100% +[1-9]"]),
    ("huggingface_pipeline.py", ["--threshold", "0"], ["--- a batch", "100% of [0-9]+ tokens left early"]),
]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh(folder, monkeypatch):
    """In the place of conftest's: the router cache lasts for the module, so that not every example calibrates, and
    calibration is short."""
    monkeypatch.setenv("TIDE_CACHE", str(folder / "cache"))
    monkeypatch.setattr("tide_compile.calibration.train_routers._PROBE_STEPS", 100)
    monkeypatch.setattr(calibrate, "distil_shortcuts", lambda decoder, bank, *rest: bank.shortcuts)
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = save_tiny(tmp_path_factory.mktemp("model"), layers=9)
    text = "\n\n".join(f"Paragraph {i} has words enough to be one: {'abc def ' * (15 + i % 3)}." for i in range(10))
    (folder / "texts.txt").write_text(text)
    return folder


@pytest.mark.parametrize(("name", "arguments", "expected"), RUN)
def test_example(folder, name, arguments, expected, monkeypatch, capsys):
    """From the command line to what it prints. Catches an example that has fallen behind the package."""
    monkeypatch.setattr(
        backend, "lower", lambda program, config, *rest: lower(program, replace(config, lowering="eager"), *rest)
    )
    common = [str(folder), "--texts", str(folder / "texts.txt"), "--samples", "10", "--tokens", "4"]
    monkeypatch.setattr(sys, "argv", [name, *common, *(a.format(folder) for a in arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    assert not ended.value.code, printed
    for pattern in expected:
        assert re.search(pattern, printed), printed


def test_every_example_is_run():
    """Catches one that was added and is not tested."""
    assert {path.name for path in EXAMPLES.glob("*.py")} == {name for name, *_ in RUN} | {"serve.py"}


@pytest.mark.slow
def test_serve(tmp_path):
    """As a process, compiled, on loopback: a request, its metrics, and an end by SIGTERM with exit code 0 or by the
    signal. Catches a server that does not start, listens on other addresses, or cannot be stopped."""
    folder = save_tiny(tmp_path, layers=2)  # it is compiled
    command = [sys.executable, EXAMPLES / "serve.py", folder, "--threshold", "1", "--dtype", "fp32", "--port", "0"]
    command += ["--total-tokens", "64", "--name", "tiny"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    )
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                break
        else:
            pytest.fail("".join(lines))
        url = found[1]
        assert url.startswith("http://127.0.0.1:")
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] <= 5
        assert "tide_calls_total 1.0" in httpx.get(f"{url}/metrics").text
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode in (0, -signal.SIGTERM)

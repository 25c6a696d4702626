"""``tide kernels``."""

import json

import pytest
from typer.testing import CliRunner

from tide_compile.cli import app
from tide_compile.kernels.gpu.cards import CARDS


def tide(*arguments):
    return CliRunner().invoke(app, ["kernels", *arguments])


def test_command(capfd):
    done = tide("--cc", "8.0", "--dtype", "fp16", "--rows", "1", "--hidden", "576", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["kernels"]
    assert {row["kernel"].split()[0] for row in found} == {"route", "compact", "scatter", "project"}
    affine = next(row for row in found if row["kernel"] == "project affine")
    assert affine["card"] == "A100" and affine["bytes_moved"] == 2 * (576 * 576 + 3 * 576) + 1
    assert affine["roofline_seconds"] == pytest.approx(affine["bytes_moved"] / 1555e9)
    assert {card.name for card in CARDS} == {"V100", "T4", "A100", "A10G", "L4", "H100", "B200"}
    table = tide("--cc", "8.0", "--cc", "7.0", "--dtype", "bf16", "--rows", "1", "--hidden", "576").stdout
    assert "A100" in table and "none: bfloat16 needs compute capability 8.0, and V100 has 7.0" in table


def test_errors_of_the_command_are_one_line():
    for arguments, text in (
        (["--cc", "7.5", "--dtype", "bf16"], "T4"),
        (["--cc", "6.1"], "7.0, 7.5, 8.0"),
        (["--dtype", "fp8"], "fp32, fp16, bf16"),
        (["--hidden", "0"], "at least 1"),
    ):
        done = tide(*arguments)
        assert done.exit_code == 1 and text in done.stderr and done.stderr.strip().count("\n") == 0, done.stderr
    assert tide("--no-such-option").exit_code == 2
    assert isinstance(tide("--cc", "6.1", "--debug").exception, ValueError | RuntimeError)

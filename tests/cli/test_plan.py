"""``tide plan``."""

import json

from typer.testing import CliRunner

from tests.support.models import CONFIGS
from tide_compile.cli import app


def test_plan_command(tmp_path):
    """From a config alone, and one line for a mistake."""
    CONFIGS["rmsnorm-rope-gqa"]().save_pretrained(tmp_path)
    arguments = ["plan", str(tmp_path), "--device", "A100", "--batch", "2", "--depth", "1", "--json"]
    done = CliRunner().invoke(app, arguments)
    (forecast,) = json.loads(done.stdout)["forecasts"]
    assert done.exit_code == 0 and forecast["batch"] == 2 and forecast["speedup"] > 0
    done = CliRunner().invoke(app, ["plan", str(tmp_path), "--device", "A1000"])
    assert done.exit_code == 1

"""tide_compile: decoder layers that a token does not need are not run.

``torch.compile(model, backend="tide")`` cuts a transformers language model at its layers, asks a small router at a few
checkpoints whether each token is done, and skips the rest for those that are.
"""

from pathlib import Path

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():  # a checkout, editable or bare: passes/ and kernels/ lie beside this folder
    __path__.append(str(_root))

from tide_compile.compat.quiet_imports import quiet_imports  # noqa: E402  (needs __path__)

with quiet_imports():
    from tide_compile import compat
    from tide_compile.calibration.calibrate import calibrate
    from tide_compile.calibration.synthetic import synthetic_routers
    from tide_compile.config import TIDEConfig
    from tide_compile.generation import captured_outputs, compiled_generate
    from tide_compile.generation.engine import TIDE
    from tide_compile.generation.token_trace import TokenTrace
    from tide_compile.inspection.explain import explain
    from tide_compile.inspection.graph_dump import dump
    from tide_compile.kernels.cpu.packed_weights import drop_packed, packed_bytes
    from tide_compile.reference import eager_reference
    from tide_compile.routers.bank import RouterBank, TokenRouter
    from tide_compile.routers.lookup import attach
    from tide_compile.runtime.exit_stats import ExitStats, record_exits
    from tide_compile.runtime.overrides import exit_threshold
    from tide_compile.runtime.piece_times import record_times

compiled_generate.install()  # torch.compile imports this package when it looks the backend up
captured_outputs.install()
compat.install()
RouterBank.synthetic = staticmethod(synthetic_routers)  # its public name of before

__version__ = "0.1.0"
__all__ = [
    "TIDE",
    "ExitStats",
    "RouterBank",
    "TIDEConfig",
    "TokenRouter",
    "TokenTrace",
    "attach",
    "calibrate",
    "drop_packed",
    "dump",
    "eager_reference",
    "exit_threshold",
    "explain",
    "packed_bytes",
    "record_exits",
    "record_times",
    "synthetic_routers",
]

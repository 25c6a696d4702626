"""Modules that lay elsewhere in 0.1.0 can be imported by their names of then; that is a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "agreement": "thresholds.agreement",
    "certify": "thresholds.certify",
    "collect": "calibration.statistics",
    "compaction": "runtime.compaction_policy",
    "compiled": "lowering.compile_piece",
    "corpus": "text.corpus",
    "costs": "planning.token_costs",
    "decision": "runtime.host_read",
    "decoder": "model.decoder",
    "device": "lowering.machine",
    "engine": "generation.engine",
    "engine_stats": "runtime.exit_stats",
    "executor": "runtime.executor",
    "fingerprint": "model.fingerprint",
    "finished": "generation.finished_rows",
    "fit": "calibration.fit_bank",
    "gather": "calibration.collect_states",
    "generate_guard": "generation.compiled_generate",
    "graph_chart": "inspection.plan_chart",
    "graph_dump": "inspection.graph_dump",
    "graph_report": "inspection.graph_report",
    "graph_source": "inspection.graph_source",
    "inspect": "inspection.explain",
    "loading": "model.loading",
    "networks": "routers.networks",
    "norms": "model.norm",
    "pages": "inspection.html",
    "plan_page": "inspection.plan_page",
    "project": "calibration.fit_maps",
    "refine": "calibration.distil_shortcuts",
    "registry": "routers.lookup",
    "screen": "thresholds.sweep",
    "selftext": "text.self_text",
    "serving_replies": "serving.replies",
    "serving_requests": "serving.requests",
    "serving_worker": "serving.worker",
    "stats": "runtime.exit_stats",
    "synthetic": "calibration.synthetic",
    "texts": "text.sources",
    "times": "runtime.piece_times",
    "token_texts": "generation.token_trace",
    "trace": "generation.token_trace",
    "train": "calibration.train_routers",
    "tune": "planning.frontier",
    "watch": "inspection.observer",
}
_PACKAGE = __name__.rpartition(".")[0]


class _Moved(MetaPathFinder, Loader):
    """Finds a module of before under its name of today. Asked last, so that it never hides anything."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, module = name.rpartition(".")
        return ModuleSpec(name, self) if package == _PACKAGE and module in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        today = f"{_PACKAGE}.{MOVED[spec.name.rpartition('.')[2]]}"
        warnings.warn(f"{spec.name} is {today} now", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(today)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state  # its own, which the import system has replaced


def install() -> None:
    """Let the import system ask, once per process."""
    if not any(type(finder).__name__ == _Moved.__name__ for finder in sys.meta_path):
        sys.meta_path.append(_Moved())

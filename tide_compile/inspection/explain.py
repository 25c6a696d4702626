"""explain: what the compiler would do with a model, and why, without compiling it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.fx import GraphModule

from tide_compile.config import TIDEConfig
from tide_compile.errors import NoRouterError, TideError
from tide_compile.files import write_text
from tide_compile.inspection.graph_report import GraphReport
from tide_compile.inspection.observer import CompileObserver
from tide_compile.inspection.plan_page import plan_page
from tide_compile.passes.plan import Settings
from tide_compile.passes.run import PassEvent, run
from tide_compile.routers.bank import RouterBank
from tide_compile.routers.settings import settings_of, settings_of_bank
from tide_compile.torch_internals.dynamo import original_of


@dataclass(slots=True)
class Explanation:
    """One report per graph that Dynamo made of the call: one, unless the model breaks into several.

    Attributes:
        graphs: the reports, with ``layers``, ``pieces``, ``steps``, ``error`` and ``notes``.
    """

    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def main(self) -> GraphReport:
        """The graph that holds the layers, or the first that was refused."""
        cut = [g for g in self.graphs if g.error is None]
        return max(cut, key=lambda g: len(g.layers)) if cut else self.graphs[0]

    def __repr__(self) -> str:
        if len(self.graphs) == 1:
            return str(self.main)
        return "\n\n".join(f"graph {i}\n{graph}" for i, graph in enumerate(self.graphs))

    def to_html(self, path: str | Path | None = None, **measured: object) -> str:
        """The plan as a page; ``measured`` (``stats``, ``times``): see ``plan_page``. Also written to ``path``."""
        page = plan_page(self.main, **measured)
        if path is not None:
            write_text(Path(path), page)
        return page

    def to_dict(self) -> dict[str, object]:
        """The same as plain values."""
        return {"graphs": [g.to_dict() for g in self.graphs]}


@torch.no_grad()
def explain(
    model: nn.Module, *inputs: object, options: Mapping[str, object] | None = None, **kwargs: object
) -> Explanation:
    """Run the passes on the graph of ``model(*inputs, **kwargs)`` and tell what they did.

    The call itself runs once, uncompiled. Nothing is handed to Inductor, and what ``torch.compile`` has made of the
    model before stays. A model without routers is shown with checkpoints where calibration would put them.

    Args:
        model: a causal language model, compiled or not. inputs, kwargs: of its forward, such as ``input_ids``.
        options: of the backend.

    Returns:
        A report per graph; printed, the plan as a table.

    Raises:
        ConfigError, UnknownOptionError: about the options. A graph that cannot be cut is no error here: its report
            tells why.
    """
    options = dict(options or {})
    router, dump = options.pop("router", None), options.pop("dump", None)
    options.pop("mode", None)
    config = TIDEConfig.from_options(options)
    found = Explanation()

    def backend(gm: GraphModule, example_inputs: Sequence[object]) -> Callable[..., object]:
        report, observer = GraphReport(), CompileObserver(dump)
        found.graphs.append(report)

        def observe(event: PassEvent) -> None:
            report(event)
            observer(event)

        try:
            program, plan = run(gm, lambda: _settings(config, router, example_inputs, report), observe)
        except TideError as error:
            report.error = f"{type(error).__name__}: {error}"
            observer.failed(error)
        else:
            report.planned(program, plan)
            observer.planned(program, plan)
        return gm

    torch.compile(original_of(model), backend=backend, isolate_recompiles=True)(*inputs, **kwargs)
    return found


def _settings(config: TIDEConfig, router: object, example_inputs: Sequence[object], report: GraphReport) -> Settings:
    try:
        return settings_of(config, router, example_inputs)
    except NoRouterError as error:
        first = next(x for x in example_inputs if isinstance(x, nn.Parameter) and x.is_floating_point())
        report.notes.append(f"no routers: {error}")
        report.notes.append("the checkpoints shown are where the options would put them")
        bank = RouterBank.untrained(int(report.shape[-1]), report.num_layers)
        return settings_of_bank(bank, config, first.device, first.dtype)

"""The policy of compaction: when to leave rows out, and in which segments that pays."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tide_compile.config import TIDEConfig
from tide_compile.kernels.compact import compact as chosen_rows
from tide_compile.lowering.machine import measure_machine
from tide_compile.passes.compact_rows import axis_of
from tide_compile.passes.graph.compaction_cost import Work, work_of
from tide_compile.passes.graph.fx_tools import hint
from tide_compile.passes.plan import Plan
from tide_compile.passes.program import Program

_MARGIN = 0.95  # a compact segment must be predicted to take less than this share of the masked one's time
_FEWEST = 2  # compiled code takes sizes of 0 and 1 for constants


@dataclass(frozen=True, slots=True)
class CompactionDecision:
    """Of one segment. Seconds are predictions; ``left`` is the share of the masked segment's operations (matrix
    products and attention) that the compact one has, 0..1."""

    segment: str
    rows: int
    kept: int
    masked_seconds: float
    compact_seconds: float
    left: float
    compact: bool

    def __str__(self) -> str:
        return (
            f"{self.segment}: {self.kept} of {self.rows} rows, masked {self.masked_seconds * 1e3:.2f} ms, compact "
            f"{self.compact_seconds * 1e3:.2f} ms predicted: {'compact' if self.compact else 'masked'}"
        )


class CompactionPolicy:
    """Decides for the segments of one compiled graph.

    Args:
        program, plan: what was compiled.
        config: ``compaction`` and ``compaction_threshold``.
    """

    def __init__(self, program: Program, plan: Plan, config: TIDEConfig) -> None:
        self._wish, self._threshold = config.compaction, config.compaction_threshold
        value = plan.boundaries.entering_value
        self._axis = axis_of(value)
        self._dtype = value.dtype
        rows = hint(value.shape[0]) * hint(value.shape[1])
        self._names = [segment.plain.name for segment in program.segments]
        self._work: dict[int, Work] = {
            index: work_of(segment.compact.graph, rows)
            for index, segment in enumerate(program.segments)
            if segment.compact is not None
        }

    @property
    def possible(self) -> bool:
        return bool(self._work) and self._wish != "never"

    def due(self, before: int, remaining: int) -> bool:
        """Whether enough rows have left since there were ``before``."""
        return remaining <= before * (1 - self._threshold)

    def rows(self, active: Tensor, remaining: int, most: int) -> Tensor:
        """Indices of the active rows of [B, S]: [n] or, by sequence, [B, n], where others fill up a sequence that has
        fewer. ``remaining``: how many there are; ``most``: in one sequence."""
        per_sequence = self._axis.batch is not None
        length = active.shape[self._axis.row]
        count = min(length, max(_FEWEST, most if per_sequence else remaining))
        rows = chosen_rows(active if per_sequence else active.reshape(1, -1), count)
        return rows if per_sequence else rows[0]

    def some_rows(self, active: Tensor) -> Tensor:
        """As ``rows``, about half of the rows: with all of them, sizes would be taken for equal."""
        chosen = self.rows(active, active.numel(), active.shape[1])
        return chosen[..., : max(_FEWEST, chosen.shape[-1] // 2)].contiguous()

    def decide(self, segment: int, rows: Tensor, active: Tensor) -> CompactionDecision | None:
        """None for a segment that has no compact form."""
        work = self._work.get(segment)
        if work is None:
            return None
        device = measure_machine(active.device, self._dtype)
        total, kept = active.numel(), rows.numel()
        masked, compact = work.masked_seconds(total, device), work.compact_seconds(total, kept, device)
        pays = self._wish == "always" or compact < _MARGIN * masked
        return CompactionDecision(self._names[segment], total, kept, masked, compact, work.left(total, kept), pays)

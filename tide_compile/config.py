"""TIDEConfig: every setting, by the names of the reference, validated once and frozen."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace

from tide_compile.errors import ConfigError, UnknownOptionError
from tide_compile.torch_internals.switches import ALL, TRICKS, disabled_by_environment, enabled, unknown

_CHOICES = {
    "exit_strategy": ("auto", "identity", "affine", "low_rank"),
    "router_kind": ("probe", "mlp"),
    "kv_cache_strategy": ("auto", "shortcut", "propagate", "zero_pad"),
    "calibration_label": ("agreement", "cosine"),
    "lowering": ("inductor", "eager"),
    "fallback": (None, "inductor"),
    "compaction": ("auto", "always", "never"),
}
_SHARES = ("convergence_threshold", "compaction_threshold", "exit_threshold")
DEFAULT_THRESHOLD = 0.85
_OPEN = ("min_layers", "checkpoint_interval", "exit_threshold")  # may be None: as the routers say
_POSITIVE = (
    "min_layers", "checkpoint_interval", "calibration_samples", "router_bottleneck_dim", "projection_rank",
    "probe_rank", "probe_vocabulary",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TIDEConfig:
    """Settings of the compiler and of calibration; the same names are the options of ``backend="tide"``.

    Attributes:
        exit_threshold: a token leaves when its router score is strictly above this, 0..1. 1.0 turns TIDE off. None: the
            thresholds that the routers bring with them, and 0.85 for routers without any.
        min_layers: no token leaves before it has passed this many layers. None: as the routers were calibrated, and 8
            for routers that do not tell, or when calibrating.
        checkpoint_interval: layers from one checkpoint to the next. None: likewise, and 4.
        exit_strategy: what an exited state goes through before the final norm: ``"identity"`` (nothing), ``"affine"``
            (a learned map per checkpoint), ``"low_rank"`` (the same, factored) or ``"auto"`` (affine when calibrating;
            what the routers were calibrated with when running).
        kv_cache_strategy: what skipped layers keep for an exited token: ``"shortcut"`` (K and V of a state that a small
            learned map per layer leads on), ``"propagate"`` (K and V of its frozen state), ``"zero_pad"`` (zeros, as
            the reference) or ``"auto"`` (shortcuts when calibrating; when running, those of the routers, or, if they
            have none, ``"propagate"``).
        compaction: whether segments leave out rows that have exited: ``"auto"`` (where the cost model says that it
            pays, and on a CPU in no step of up to four rows), ``"always"`` or ``"never"`` (they are masked).
        compaction_threshold: share of active rows that must have left since the last decision before the next.
        calibration_samples: number of texts read by ``calibrate``.
        calibration_dataset: a data set name, a local text or jsonl file, or ``"pydoc"``.
        calibration_label: what a router learns: ``"agreement"`` (the exited state predicts the full model's token) or
            ``"cosine"`` (the reference's: similarity with the final state above ``convergence_threshold``).
        convergence_threshold: cosine above which the ``"cosine"`` label calls a token converged.
        router_kind: ``"probe"`` (sees how sure the model would be, through a small vocabulary) or ``"mlp"`` (the
            reference's, sees the state only).
        router_bottleneck_dim: width of the router's hidden layer.
        probe_rank, probe_vocabulary: size of the probe's map, and number of tokens that it knows.
        projection_rank: of ``"low_rank"`` projections, and of shortcuts.
        distillation_steps: of 256 tokens, by which ``calibrate`` distils a projection; 0: ridge regression only.
        lowering: ``"inductor"``, or ``"eager"`` to run the pieces uncompiled (debugging, tests).
        pack_weights: on a CPU, products may read copies of their weights in the order that is fastest to multiply,
            where that is faster. Copies take as much memory again as those weights (``tide_compile.packed_bytes()``);
            values that are written in place through ``.data`` later need ``tide_compile.drop_packed()``.
        disable: names of tricks that are not used, or ``"all"``: what leans on torch's insides and changes no result
            (``torch_internals.switches.TRICKS``). ``TIDE_DISABLE`` does the same for the whole process, and it alone
            switches off what happens before options are read (``compiled_generate``; ``prewarm`` but in ``TIDE``).
        fallback: ``None``: a graph that TIDE cannot serve is an error. ``"inductor"``: it is compiled without exits,
            and that is logged.

    Raises:
        ConfigError: a value is not allowed; says which are.
    """

    exit_threshold: float | None = None
    min_layers: int | None = None
    checkpoint_interval: int | None = None
    exit_strategy: str = "auto"
    kv_cache_strategy: str = "auto"
    compaction: str = "auto"
    compaction_threshold: float = 0.25
    calibration_samples: int = 2000
    calibration_dataset: str = "wikitext"
    calibration_label: str = "agreement"
    convergence_threshold: float = 0.98
    router_kind: str = "probe"
    router_bottleneck_dim: int = 128
    probe_rank: int = 128
    probe_vocabulary: int = 2048
    projection_rank: int = 64
    distillation_steps: int = 200
    lowering: str = "inductor"
    pack_weights: bool = False
    disable: tuple[str, ...] = ()
    fallback: str | None = None

    def __post_init__(self) -> None:
        for name in _SHARES:
            value = getattr(self, name)
            if value is None and name in _OPEN:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"{name}={value!r} is not allowed: give a number from 0 to 1.")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is None and name in _OPEN:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} is not allowed: give a whole number of at least 1.")
        if not isinstance(self.distillation_steps, int) or self.distillation_steps < 0:
            raise ConfigError(
                f"distillation_steps={self.distillation_steps!r} is not allowed: give a whole number of at least 0."
            )
        if not isinstance(self.pack_weights, bool):
            raise ConfigError(f"pack_weights={self.pack_weights!r} is not allowed: give True or False.")
        object.__setattr__(self, "disable", _names(self.disable))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not allowed: choose one of {list(choices)}.")

    @classmethod
    def from_options(cls, options: Mapping[str, object], base: TIDEConfig | None = None) -> TIDEConfig:
        """A config from a backend's options, on top of ``base``.

        Raises:
            UnknownOptionError: lists the known options.
            ConfigError: a value is not allowed.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(str(name), [*known, "router", "mode", "dump"], n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise UnknownOptionError(
                    f"unknown option {name!r}.{hint} Known options: {', '.join(['router', 'mode', 'dump', *known])}."
                )
        return replace(base or cls(), **options)

    @property
    def tricks(self) -> frozenset[str]:
        """The tricks that are switched on."""
        return enabled(self.disable)

    @property
    def calibrates_shortcuts(self) -> bool:
        """Whether ``calibrate`` makes shortcuts."""
        auto = self.kv_cache_strategy == "auto" and self.exit_strategy != "identity"
        return auto or self.kv_cache_strategy == "shortcut"

    def to_dict(self) -> dict[str, object]:
        """The settings as plain values."""
        return asdict(self)


def _names(disable: object) -> tuple[str, ...]:
    """The names of tricks in ``disable``, and a check of those in the environment."""
    given = (disable,) if isinstance(disable, str) else disable
    if (
        not isinstance(given, Collection)
        or isinstance(given, Mapping)
        or not all(isinstance(name, str) for name in given)
    ):
        raise ConfigError(f"disable={disable!r} is not allowed: give names, such as ['graph_replay'].")
    for where, names in (("disable", given), ("TIDE_DISABLE", disabled_by_environment())):
        if wrong := unknown(names):
            known = ", ".join((ALL, *TRICKS))
            raise ConfigError(f"{where} names {wrong[0]!r}, which cannot be switched off: choose from {known}.")
    return tuple(given)

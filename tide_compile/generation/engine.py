"""TIDE: a model, its routers and one static cache behind ``generate``."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from tide_compile.config import TIDEConfig
from tide_compile.generation.compiled_generate import generating_model, routed_through
from tide_compile.generation.guard_skipping import GuardSkipping, call, skipping_guards
from tide_compile.generation.static_cache import KeptCache, mark_sizes
from tide_compile.generation.token_trace import TokenTrace
from tide_compile.lowering import prewarm
from tide_compile.routers.bank import RouterBank
from tide_compile.routers.lookup import resolve_bank
from tide_compile.runtime.exit_stats import EngineStats, ExitStats, Totals, record_exits
from tide_compile.runtime.overrides import rehearsal
from tide_compile.torch_internals.dynamo import original_of

_WARM_TOKENS = 3  # the prompt's, and two of decoding: Dynamo sees another input in the second
_GRAPHS = 64  # prompts, decoding, batches, other caches, logits alone: one program uses more than Dynamo's usual 8
_OTHER_CACHE = ("cache", "past_key_values", "cache_implementation", "assistant_model", "prompt_lookup_num_tokens")


class TIDE:
    """Early-exit inference for a transformers causal language model.

    Args:
        model: the model, or a wrapper with adapters around it; it is not changed.
        router_path: a router file (also a ``router.pt`` of tide-inference), a ``RouterBank``, or None for routers that
            were attached or are in the router cache.
        config: settings; ``exit_threshold=1.0`` needs no routers.
        mode: Inductor's mode, such as ``"reduce-overhead"`` on a GPU.

    Attributes:
        model: a twin of the model that shares its weights and runs compiled: hand this one to ``pipeline``.
        last_stats: exits of the latest call or ``generate``.
        last_trace: layer and score of every token of the latest ``generate``, if that had ``trace=True``.
        stats: exits of all of them so far (``EngineStats``), as a copy that later calls do not change.

    Raises:
        NoRouterError, RouterMismatchError, RouterFileError: about the routers.
        ConfigError: there is no transformers model here, or a wrapper does more than call it.
    """

    def __init__(
        self,
        model: nn.Module,
        router_path: str | Path | RouterBank | None = None,
        config: TIDEConfig | None = None,
        *,
        mode: str | None = None,
    ) -> None:
        model = generating_model(model)
        self.config = config or TIDEConfig()
        options = self.config.to_dict()
        if self.config.exit_threshold != 1:
            options["router"] = resolve_bank(router_path, model)
        if mode is not None:
            options["mode"] = mode
        self._compile = functools.partial(
            torch.compile,
            model,
            backend="tide",
            options=options,
            fullgraph=self.config.fallback is None,  # else a break, or too many recompilations, would go unnoticed
            isolate_recompiles=True,
            recompile_limit=_GRAPHS,
        )
        tricks = self.config.tricks
        with prewarm.only_if("prewarm" in tricks):
            self._compiled, self._hooks = self._compile(), _hooks_of(model)
        self.model = routed_through(self._compiled, self._forward)
        self._cache = KeptCache(self.model)
        self.model._prepare_static_cache = self._cache.prepare
        self.model.generate = self._generate
        # a graph break needs Dynamo to be on, and CUDA graphs count its calls
        self._skips_guards = "guard_skipping" in tricks and self.config.fallback is None and mode is None
        self._replays = "graph_replay" in tricks
        self._recorded: set[str] = set()  # outputs that have been asked for before
        self._lock = threading.Lock()
        self.last_stats: ExitStats | None = None
        self.last_trace: TokenTrace | None = None
        self._totals = Totals()

    @property
    def stats(self) -> EngineStats:
        """Exits of all calls so far: a copy that later calls do not change."""
        return self._totals.read()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: object) -> Tensor:
        """Logits [B, S, V] of token ids [B, S]; further arguments go to the model's forward."""
        with self._counted():
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).logits

    def generate(self, input_ids: Tensor | None = None, **kwargs: object) -> object:
        """transformers' ``generate`` on the compiled model, with a static cache that is kept between calls.

        Takes every argument of ``generate`` (sampling, streamers, stopping criteria, ...) and returns what it returns.
        ``temperature=0`` means greedy, as in the reference. Calls from several threads run one after the other.
        ``trace=True`` keeps the layer and the score of every token in ``last_trace``.

        Raises:
            ModelChangedError: the model was changed meanwhile (by a streamer, a logits processor, ...).
        """
        if kwargs.get("temperature") == 0:
            kwargs |= {"temperature": None, "do_sample": False}
        if kwargs.get("use_cache") is not False and not any(kwargs.get(n) is not None for n in _OTHER_CACHE):
            kwargs["cache_implementation"] = "static"
        return self._generate(input_ids, **kwargs)

    def warmup(self, batch_size: int = 1, prompt_length: int = 16, max_new_tokens: int = 64) -> float:
        """Compile everything that prompts and decoding of ``batch_size`` sequences can need, before the first request.

        Args:
            prompt_length: of the prompt that is run; those of other lengths need no compilation of their own.
            max_new_tokens: of the requests to come; with ``prompt_length``, the cache is made long enough for them.

        Returns:
            Seconds that it took.
        """
        started = time.perf_counter()
        ids = torch.ones(batch_size, prompt_length, dtype=torch.long, device=self.model.device)
        self._cache.prepare("static", batch_size, prompt_length + max_new_tokens)
        with rehearsal():
            self.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=_WARM_TOKENS)
        self.last_stats = None
        return time.perf_counter() - started

    @staticmethod
    def calibrate(*args: object, **kwargs: object) -> RouterBank:
        """``tide_compile.calibrate``, where the reference has it."""
        from tide_compile.calibration.calibrate import calibrate

        return calibrate(*args, **kwargs)

    def _generate(self, *args: object, trace: bool = False, **kwargs: object) -> object:
        """``generate`` of the twin: one call at a time, because there is one cache."""
        if trace:
            generation = kwargs.get("generation_config") or self.model.generation_config
            TokenTrace.check(kwargs, kwargs.get("num_beams", generation.num_beams))
        with self._lock, self._counted(per_token=trace):
            skipping = GuardSkipping(self._compiled, self._replays)
            with skipping_guards(skipping) if self._skips_guards else nullcontext():
                result = type(self.model).generate(self.model, *args, **kwargs)
            skipping.finish()
            if not isinstance(result, Tensor):
                self._cache.hand_over()  # to the caller, in the result
            self.last_trace = self._trace(result, args, kwargs) if trace else None
        return result

    def _trace(self, result: object, args: tuple, kwargs: dict[str, object]) -> TokenTrace | None:
        given = [*(args[:1] or ()), kwargs.get("input_ids"), kwargs.get("inputs")]
        prompt = next((ids for ids in given if ids is not None), None)
        ids = result if isinstance(result, Tensor) else result.sequences
        length = 0 if prompt is None else prompt.shape[1]
        return TokenTrace.of(self.last_stats, ids, length, kwargs.get("tokenizer"))

    @contextmanager
    def _counted(self, per_token: bool = False) -> Iterator[None]:
        """The exits of the block become ``last_stats`` and part of ``stats``, also when it ends in an error."""
        hooks = _hooks_of(original_of(self._compiled))
        if hooks != self._hooks:  # Dynamo does not look for hooks that came or went
            self._compiled, self._hooks = self._compile(), hooks
        started = time.perf_counter()
        with record_exits(per_token=per_token) as stats:
            self.last_stats = stats
            try:
                yield
            finally:
                self._totals.add(stats, time.perf_counter() - started)

    def _forward(self, *args: object, **kwargs: object) -> object:
        wanted = {n for n, value in kwargs.items() if n.startswith("output_") and value}
        if wanted - self._recorded:  # transformers hooks the model in the first such call, which no graph can hold
            ids = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
            with torch.no_grad():
                original_of(self._compiled).forward(input_ids=ids, use_cache=False, **dict.fromkeys(wanted, True))
            self._recorded |= wanted
            self._hooks = _hooks_of(original_of(self._compiled))  # code that was compiled without them stays right
        mark_sizes(kwargs)
        return call(self._compiled, *args, **kwargs)


def _hooks_of(model: nn.Module) -> list[tuple[nn.Module, Callable[..., object]]]:
    return [(m, hook) for m in model.modules() for d in (m._forward_pre_hooks, m._forward_hooks) for hook in d.values()]

"""TIDE: a model, its routers and one static cache behind ``generate``."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.utils import ModelOutput

from tide_compile.config import TIDEConfig
from tide_compile.errors import GraphBreakError
from tide_compile.generation.captured_outputs import HOOKS_OF
from tide_compile.generation.compiled_generate import arguments, generating_model, twin_of
from tide_compile.generation.generate_call import current_call, generate_call, no_generate_call
from tide_compile.generation.guard_skipping import GuardSkipping, call, skipping_guards
from tide_compile.generation.static_cache import KeptCache, KeptCaches, dynamic_copy, has_plain_layers, mark_sizes
from tide_compile.generation.token_trace import TokenTrace
from tide_compile.lowering import prewarm
from tide_compile.routers.bank import RouterBank
from tide_compile.routers.lookup import resolve_bank
from tide_compile.runtime.exit_stats import EngineStats, ExitStats, Totals, record_exits
from tide_compile.runtime.overrides import rehearsal
from tide_compile.torch_internals.dynamo import (
    RecompileLimitHit,
    Unsupported,
    break_of,
    compiles,
    no_process_limit,
    original_of,
)

log = logging.getLogger("tide_compile")
_WARM_TOKENS = 3  # the prompt's, and two of decoding: Dynamo sees another input in the second
_GRAPHS = 1000  # prompts, decoding, batches, other caches, other outputs: one program uses more than Dynamo's usual 8
_OTHER_CACHE = (
    "cache", "past_key_values", "cache_implementation", "assistant_model", "prompt_lookup_num_tokens",
)  # fmt: skip


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
        ConfigError: there is no transformers model here, a wrapper does more than call it, or dropout is active.
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
        options, whole = self.config.to_dict(), self.config.fallback is None
        if self.config.exit_threshold != 1:
            options["router"] = resolve_bank(router_path, model)
        if mode is not None:
            options["mode"] = mode
        self._compile = functools.partial(
            _compile,
            model,
            backend="tide",
            options=options,
            fullgraph=whole,  # else a break, or too many recompilations, would go unnoticed
            isolate_recompiles=True,
            recompile_limit=_GRAPHS,
        )
        tricks = self.config.tricks
        with prewarm.only_if("prewarm" in tricks):
            self._compiled, self._hooks = self._compile(), _hooks_of(model)
        self.model = twin_of(model, self._forward)
        self._caches = KeptCaches(self.model)
        self.model._prepare_static_cache = self._static_cache
        self.model.generate = self._generate
        # a graph break needs Dynamo to be on, and CUDA graphs count its calls
        if self._compiled is model:
            log.warning("torch.compile is switched off (TORCH_COMPILE_DISABLE): every token runs all layers")
        self._skips_guards = "guard_skipping" in tricks and whole and mode is None and self._compiled is not model
        self._replays = "graph_replay" in tricks
        self._turn = threading.RLock()  # two forwards at once would only take each other's cores
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
        with self._counted(), no_generate_call():
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).logits

    def generate(self, *args: object, **kwargs: object) -> object:
        """transformers' ``generate`` on the compiled model, with a static cache that is kept between calls.

        Takes every argument of ``generate`` (sampling, streamers, stopping criteria, ...) in every form, and returns
        what it returns. ``temperature=0`` means greedy, as in the reference. Calls from several threads take turns,
        token by token. ``trace=True`` keeps the layer and the score of every token in ``last_trace``.

        Raises:
            ConfigError: prompts without tokens, and what cannot be done with compiled layers.
            ModelChangedError: the model was changed meanwhile (by a streamer, a logits processor, ...).
            GraphBreakError: the model cannot be traced as one graph, and ``fallback`` is None.
        """
        if kwargs.get("temperature") == 0:
            kwargs |= {"temperature": None, "do_sample": False}
        ours = self._may_choose_cache(arguments(self.model, args, kwargs))
        if ours:
            kwargs["cache_implementation"] = "static"
        return self._generate(*args, _ours=ours, **kwargs)

    def _may_choose_cache(self, asked: dict[str, object]) -> bool:
        """Whether nobody sees that a ``generate`` has another cache than it would have by default."""
        config = asked.get("generation_config")
        given = (asked.get(n, getattr(config, n, None)) for n in _OTHER_CACHE)
        if any(value is not None for value in given):
            return False

        def wanted(name: str) -> object:
            places = (config, self.model.generation_config, self.model.config)
            found = (asked.get(name), *(getattr(place, name, None) for place in places))
            return next((value for value in found if value is not None), None)

        if wanted("use_cache") is False or wanted("output_attentions"):  # as long as the cache
            return False
        return not wanted("return_dict_in_generate") or has_plain_layers(self.model)

    def warmup(self, batch_size: int = 1, prompt_length: int = 16, max_new_tokens: int = 64) -> float:
        """Compile everything that prompts and decoding of ``batch_size`` sequences can need, before the first request:
        exits at every checkpoint, greedy search and sampling, prompts of several sequences with padding and without.

        Args:
            prompt_length: of the prompt that is run; those of other lengths need no compilation of their own.
            max_new_tokens: of the requests to come; with ``prompt_length``, the cache is made long enough for them.

        Returns:
            Seconds that it took.
        """
        started = time.perf_counter()
        ids = torch.ones(batch_size, prompt_length, dtype=torch.long, device=self.model.device)
        self._caches.give_back(self._caches.take(batch_size, prompt_length + max_new_tokens))
        padded = torch.ones_like(ids)
        padded[0, 0] = 0
        several = batch_size > 1 and prompt_length > 1
        with rehearsal():
            for mask, tokens in [(torch.ones_like(ids), _WARM_TOKENS), (padded, 1)][: 1 + several]:
                length = {"min_new_tokens": tokens, "max_new_tokens": tokens}  # an end token would come too early
                self.generate(ids, attention_mask=mask, do_sample=False, num_beams=1, **length)
        self.last_stats = None
        return time.perf_counter() - started

    @staticmethod
    def calibrate(*args: object, **kwargs: object) -> RouterBank:
        """``tide_compile.calibrate``, where the reference has it."""
        from tide_compile.calibration.calibrate import calibrate

        return calibrate(*args, **kwargs)

    def _generate(self, *args: object, trace: bool = False, _ours: bool = False, **kwargs: object) -> object:
        """``generate`` of the twin. ``_ours``: the cache is, and not what the caller has asked for."""
        asked = arguments(self.model, args, kwargs)
        if trace:
            TokenTrace.check(asked, asked.get("generation_config") or self.model.generation_config)
        with self._counted(per_token=trace) as stats, generate_call(self.model) as call:
            kept = call.caches
            try:
                skipping = GuardSkipping(self._compiled, self._replays)
                with skipping_guards(skipping) if self._skips_guards else nullcontext():
                    result = type(self.model).generate(self.model, *args, **kwargs)
                skipping.finish()
                if isinstance(result, ModelOutput):
                    kept = self._handed_out(result, kept) if _ours else []
            finally:
                for cache in kept:
                    self._caches.give_back(cache)
            self.last_trace = self._trace(stats, result, asked) if trace else None
        return result

    def _handed_out(self, result: ModelOutput, kept: list[KeptCache]) -> list[KeptCache]:
        """Those of the caches ``kept`` that are not in a result: there they become what the caller expects."""
        for name, value in result.items():
            if any(value is k.cache for k in kept):
                result[name] = dynamic_copy(value, self.model)
        return kept

    def _static_cache(
        self, cache_implementation: str, batch_size: int, max_cache_len: int, *args: object, **kwargs: object
    ) -> Cache:
        """In the place of transformers' ``_prepare_static_cache``, which makes a new cache for every ``generate``."""
        call = current_call(self.model)
        if call is None or "offloaded" in cache_implementation or self.model.config.is_encoder_decoder:
            prepare = type(self.model)._prepare_static_cache
            return prepare(self.model, cache_implementation, batch_size, max_cache_len, *args, **kwargs)
        call.caches.append(self._caches.take(batch_size, max_cache_len))
        return call.caches[-1].cache

    def _trace(self, stats: ExitStats, result: object, asked: dict[str, object]) -> TokenTrace | None:
        prompt = next((asked[n] for n in ("inputs", "input_ids") if asked.get(n) is not None), None)
        ids = result if isinstance(result, Tensor) else result.sequences
        return TokenTrace.of(stats, ids, 0 if prompt is None else prompt.shape[1], asked.get("tokenizer"))

    @contextmanager
    def _counted(self, per_token: bool = False) -> Iterator[ExitStats]:
        """The exits of the block become ``last_stats`` and part of ``stats``, also when it ends in an error."""
        hooks = _hooks_of(original_of(self._compiled))
        if hooks != self._hooks:  # Dynamo does not look for hooks that came or went
            self._compiled, self._hooks = self._compile(), hooks
        started = time.perf_counter()
        with record_exits(per_token=per_token, owner=self) as stats:
            self.last_stats = stats
            try:
                yield stats
            finally:
                self.last_stats = stats  # also after calls inside of this one
                self._totals.add(stats, time.perf_counter() - started)

    def _forward(self, *args: object, **kwargs: object) -> object:
        mark_sizes(kwargs)
        with self._turn:
            try:
                return self._run(*args, **kwargs)
            except Unsupported as error:
                raise GraphBreakError(
                    f"{type(self.model).__name__} cannot be traced as one graph: {break_of(error)}. "
                    "TIDEConfig(fallback='inductor') compiles what can be, without exits where layers are cut apart."
                ) from error

    def _run(self, *args: object, **kwargs: object) -> object:
        try:
            return call(self._compiled, *args, **kwargs)
        except RecompileLimitHit:  # engines share the functions of their models' class
            with no_process_limit():
                return call(self._compiled, *args, **kwargs)


def _compile(model: nn.Module, **kwargs: object) -> nn.Module:
    """The model itself where nothing is to be compiled."""
    compiled = torch.compile(model, **kwargs)
    return compiled if compiles(compiled) else model


def _hooks_of(model: nn.Module) -> list[tuple[nn.Module, Callable[..., object]]]:
    """But for those that collect outputs: code that was compiled without them stays right."""
    hooks = (
        (m, hook) for m in model.modules() for d in (m._forward_pre_hooks, m._forward_hooks) for hook in d.values()
    )
    return [(m, hook) for m, hook in hooks if getattr(hook, "__module__", None) != HOOKS_OF]

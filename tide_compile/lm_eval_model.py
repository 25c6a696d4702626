"""lm_eval_model: the model ``tide`` of EleutherAI's evaluation harness, which scores and generates with exits.

``lm_eval`` has no way to be told of models of other packages but to import them, so its command line is reached
through this module, with all of its arguments::

    python -m tide_compile.lm_eval_model --model tide --model_args pretrained=MODEL,router=FILE --tasks TASK

From Python it is enough to import this module: ``lm_eval.simple_evaluate("tide", {"pretrained": ...}, tasks=[...])``.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn

from tide_compile.config import TIDEConfig
from tide_compile.errors import ConfigError, MissingExtraError, NoRouterError
from tide_compile.generation.engine import TIDE
from tide_compile.kernels.gpu.cards import DTYPES
from tide_compile.model.loading import source_of
from tide_compile.routers.bank import RouterBank
from tide_compile.runtime.overrides import rehearsal

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise MissingExtraError(f"evaluation needs lm_eval ({error}): pip install 'tide-compile[eval]'") from error

_OPTIONS = {field.name for field in fields(TIDEConfig)}
_REFUSED = ("parallelize", "tp_plan", "mixed_precision_dtype")
_log = logging.getLogger("lm_eval.tide")  # below the harness's own, which has the handler


@register_model("tide")
class TideLM(HFLM):
    """The harness's ``hf`` model, run by an engine. A text is scored in one pass, as a prompt is read: its tokens leave
    where they would in use, and what exited tokens leave behind for later ones is the same as in decoding.

    Args:
        pretrained: a hub name, a folder, a GGUF file, or a transformers model.
        router: a router file or a ``RouterBank``; default: attached routers or those in the router cache.
        dtype: as for ``hf``, or ``fp32``, ``fp16``, ``bf16``.
        device: default: the GPU, or the CPU where there is none.
        **kwargs: fields of ``TIDEConfig``, such as ``exit_threshold``; all others go to ``HFLM``.

    Attributes:
        engine: the ``TIDE``; ``engine.stats`` counts the exits of everything that was asked for.

    Raises:
        NoRouterError, RouterMismatchError, RouterFileError: about the routers.
        ConfigError: there is no such file, an option is not allowed, or one of ``HFLM`` makes no sense here.
    """

    def __init__(
        self,
        pretrained: str | nn.Module,
        router: str | Path | RouterBank | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        **kwargs: object,
    ) -> None:
        for name in _REFUSED:
            if kwargs.get(name):
                raise ConfigError(f"{name}={kwargs[name]!r} cannot be had with exits: the model is compiled in one.")
        config = TIDEConfig(**{name: kwargs.pop(name) for name in _OPTIONS & set(kwargs)})
        where = pretrained
        if isinstance(pretrained, str):
            where, extra = source_of(pretrained)
            where, kwargs = str(where), extra | kwargs
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(where, dtype=DTYPES.get(dtype, dtype), device=device, **kwargs)
        if self.backend != "causal":
            raise ConfigError(f"backend={self.backend!r} cannot be had with exits: only decoders have them.")
        try:
            self.engine = TIDE(self._model, router, config)
        except NoRouterError as error:
            raise NoRouterError(
                f"{self._model.name_or_path!r} has no routers yet. Make them once with `tide calibrate`, or give "
                "router=FILE, or exit_threshold=1 to run without exits."
            ) from error
        self._model = self.engine.model
        self._inputs: frozenset[tuple[int, ...]] = frozenset()  # what is being scored, without padding

    def get_model_info(self) -> dict[str, object]:
        """As ``hf``, with the exits so far as ``tide``; the harness asks after a run, and they are logged then."""
        stats = self.engine.stats
        _log.info("exits of this run\n%s", stats.summary())
        return super().get_model_info() | {"tide": stats.to_dict()}

    def _loglikelihood_tokens(self, requests: list[tuple[object, list[int], list[int]]], *args, **kwargs):
        seen = slice(-(self.max_length + 1), None)
        self._inputs = frozenset(tuple((context + answer)[seen][:-1]) for _, context, answer in requests)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [B, S, V] of ids [B, S], padded with zeros on the right. The harness gives no mask, because later
        tokens do not change earlier ones; exits need one, or padding would be counted and keep layers running."""
        mask = None
        if len(inps) > 1:
            lengths = torch.tensor([self._length(row) for row in inps.tolist()], device=inps.device)
            mask = (torch.arange(inps.shape[1], device=inps.device) < lengths[:, None]).long()
        return self.engine(inps, attention_mask=mask, use_cache=False)

    def _length(self, row: list[int]) -> int:
        """Of a row without its padding. Where it may be one of several texts (token 0 is a token, too), the longest: a
        token of a text must never be masked."""
        padding = next((i for i, token in enumerate(reversed(row)) if token), len(row))
        lengths = range(len(row), max(0, len(row) - padding - 1), -1)
        return next((n for n in lengths if tuple(row[:n]) in self._inputs), len(row))

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: object) -> Tensor:
        return super()._model_generate(context, max_length, stop, **{"cache_implementation": "static"} | kwargs)

    def _detect_batch_size(self, *args: object, **kwargs: object) -> int:
        with rehearsal():  # no exits are counted
            return super()._detect_batch_size(*args, **kwargs)


if __name__ == "__main__":
    cli_evaluate()

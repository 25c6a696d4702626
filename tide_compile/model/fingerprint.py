"""fingerprint: a name for a model's weights that does not depend on their dtype."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch

from tide_compile.torch_internals.fx import is_traceable_wrapper_subclass

_SAMPLES = 16


def fingerprint(parameters: Iterable[torch.Tensor]) -> str:
    """A digest of the shapes and of 16 evenly spaced values of each parameter, rounded to bf16.

    The same checkpoint loaded in fp32 and in bf16 has the same fingerprint; a fine-tuned one has another. Order does
    not count and a tensor that is used twice (tied embeddings) counts once, so that the parameters of a module and
    those of its traced graph agree, provided the graph uses them all.
    """
    unique = {id(p): p for p in parameters}.values()
    digests = sorted(_digest(part) for p in unique for part in _parts(p))
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors of a tensor subclass (quantised weights), or the tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def _digest(parameter: torch.Tensor) -> bytes:
    flat = parameter.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    values = flat[::step][:_SAMPLES].to(torch.bfloat16).view(torch.int16).cpu()
    return hashlib.sha256(f"{tuple(parameter.shape)}{values.tolist()}".encode()).digest()

"""tide::probe: how sure the model would be at a checkpoint, seen through a small vocabulary.

A router that sees only the hidden state hardly tells which tokens may leave; the confidence of the distribution that
the state leads to does (Schuster et al., 2022, "Confident Adaptive Language Modeling", use it through the whole head).
Here the whole head is replaced by a map of rank R to the K tokens that occur most, and a small network reads off the
distribution.

Shapes: B batch, S sequence, H hidden, R rank, K probe vocabulary, F features, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tide_compile.kernels.few_rows import few_rows_linear
from tide_compile.kernels.route import normalise_reference

FEATURES = 5
PARTS = ("first", "second", "second_bias", "inner", "inner_bias", "outer")  # tensors of a probe, in the order of the op


def probe_features(logits: Tensor) -> Tensor:
    """Of [..., K] fp32: the three largest log-probabilities, the entropy and the logarithm of the sum: [..., F]."""
    total = torch.logsumexp(logits, -1, keepdim=True)
    shares = logits - total
    entropy = -(shares.exp() * shares).sum(-1, keepdim=True)
    tops, rest = [], shares
    for _ in range(3):  # reductions, which Inductor fuses, where topk would be a call
        tops.append(rest.amax(-1, keepdim=True))
        rest = torch.where(rest == tops[-1], -torch.inf, rest)
    return torch.cat([*(top.clamp_min(-30.0) for top in tops), entropy, total], -1)


def probe_reference(
    h: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    first: Tensor,
    second: Tensor,
    second_bias: Tensor,
    inner: Tensor,
    inner_bias: Tensor,
    outer: Tensor,
    eps: float,
    layer_norm: bool,
) -> Tensor:
    """What the probe adds to the router's logit.

    Args:
        h: [B, S, H] hidden state in fp32, fp16 or bf16.
        norm_weight: [H] fp32. norm_bias: [H] fp32 or None.
        first: [R, H], second: [K, R], second_bias: [K]: from the normed state to the vocabulary, in the dtype they are
            to be multiplied in.
        inner: [D, F] fp32, inner_bias: [D] fp32, outer: [1, D] fp32: the network that reads the features.

    Returns:
        [B, S] fp32.
    """
    x = normalise_reference(h, norm_weight, norm_bias, eps, layer_norm)
    return read_probe(x, first, second, second_bias, inner, inner_bias, outer)


def read_probe(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    second_bias: Tensor,
    inner: Tensor,
    inner_bias: Tensor,
    outer: Tensor,
) -> Tensor:
    """As ``probe_reference``, for the normed state [..., H] fp32."""
    x = x.to(first.dtype)
    logits = few_rows_linear(few_rows_linear(x, first), second).float() + second_bias.float()
    features = probe_features(logits)
    hidden = torch.nn.functional.silu((features.unsqueeze(-2) * inner).sum(-1) + inner_bias)
    return (hidden * outer[0]).sum(-1)


# Two matrix products and reductions, of which Inductor makes kernels for CUDA as well.
probe = torch.library.triton_op("tide::probe", probe_reference, mutates_args={})

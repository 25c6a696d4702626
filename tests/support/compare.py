"""How compiled modes are compared with the eager reference."""

from contextlib import nullcontext

import torch

import tide_compile
from tests.support.models import logits_of
from tide_compile import TIDEConfig

# how far logits may be apart, relative to the largest, and why
RELATIVE = {
    torch.float32: 1e-4,  # the bound of docs/architecture.md; fused sums in another order give 1e-6 here
    torch.float16: 1e-2,  # 11 bits of mantissa
    torch.bfloat16: 3e-2,  # 8 bits of mantissa, and Inductor keeps fp32 between fused operations where eager rounds
}


def assert_close(got, want):
    """Tensors are equal within the tolerance of their dtype."""
    assert got.shape == want.shape
    bound = RELATIVE[want.dtype] * want.float().abs().max()
    error = (got.float() - want.float()).abs().max()
    assert error <= bound, f"largest difference {error:.2e}, allowed {bound:.2e}"


def threshold_between(model, bank, share, cache, batch, padding=3, **settings):
    """A threshold that about ``share`` of the tokens exceed at some checkpoint, halfway between two scores so that
    rounding cannot change an exit."""
    config = TIDEConfig(exit_threshold=0.999, **settings)
    with tide_compile.eager_reference(model, bank, config) as reference:
        logits_of(model, model, cache, batch, padding=padding)
    calls = [torch.stack(list(call.values())).flatten(1) for call in reference.scores]  # each (checkpoints, tokens)
    target = torch.cat([call.amax(0) for call in calls]).quantile(1 - share)
    scores = torch.cat([call.flatten() for call in calls]).sort().values
    middle = int(torch.searchsorted(scores, target).clamp(3, len(scores) - 3))
    gaps = scores[middle - 3 : middle + 3].diff()
    best = middle - 3 + gaps.argmax()
    return ((scores[best] + scores[best + 1]) / 2).item()


def check(model, bank, cache, batch, threshold, fullgraph=False, padding=3, **settings):
    """Run a model compiled and by the eager reference: same exit layers, logits within tolerance. Returns the exits."""
    return check_each(model, bank, cache, batch, [threshold], fullgraph, padding, **settings)[0]


def check_each(model, bank, cache, batch, thresholds, fullgraph=False, padding=3, **settings):
    """``check`` with several thresholds: compiled with the first, which the others take the place of."""
    options = {"router": bank, "exit_threshold": thresholds[0], **settings}
    compiled = torch.compile(model, backend="tide", options=options, fullgraph=fullgraph)
    found = []
    for threshold in thresholds:
        config = TIDEConfig(exit_threshold=threshold, **settings)
        with tide_compile.eager_reference(model, bank, config) as reference:
            want = logits_of(model, model, cache, batch, padding=padding)
        override = tide_compile.exit_threshold(threshold) if found else nullcontext()
        with override, tide_compile.record_exits(per_token=True) as stats:
            got = logits_of(model, compiled, cache, batch, padding=padding)
        for ours, theirs in zip(stats.exit_layers, reference.exit_layers, strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(got, want, strict=True):
            assert_close(ours, theirs)
        found.append(stats)
    return found

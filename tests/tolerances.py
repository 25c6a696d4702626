"""The one table of tolerances: how far logits may be apart, relative to the largest, and why."""

import torch

RELATIVE = {
    torch.float32: 1e-4,  # the bound; fused sums in another order give 1e-6 here
    torch.bfloat16: 3e-2,  # 8 bits of mantissa, and Inductor keeps fp32 between fused operations where eager rounds
}


def assert_close(got, want):
    """Tensors are equal within the tolerance of their dtype."""
    assert got.shape == want.shape
    bound = RELATIVE[want.dtype] * want.float().abs().max()
    error = (got.float() - want.float()).abs().max()
    assert error <= bound, f"largest difference {error:.2e}, allowed {bound:.2e}"

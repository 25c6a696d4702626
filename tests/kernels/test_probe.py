"""The features that a probe sees."""

import pytest
import torch

from tide_compile.kernels.probe import probe_features


def test_features_of_a_distribution():
    """Catches a tie or an order that is lost, and an entropy of the wrong sign."""
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    top1, top2, top3, entropy, total = probe_features(logits)[0].tolist()
    shares = logits.log_softmax(-1)[0].sort(descending=True).values.tolist()
    assert [top1, top2, top3] == pytest.approx(shares[:3])
    assert entropy == pytest.approx(torch.distributions.Categorical(logits=logits).entropy().item(), rel=1e-5)
    assert total == pytest.approx(logits.logsumexp(-1).item())

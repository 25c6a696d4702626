"""Small functions compiled by Inductor with passes of ours, and what the passes left of their graphs."""

from collections import Counter

import torch


class Spy:
    """Counts the operators that the passes before it have left, and those of them that something uses."""

    def __call__(self, graph):
        self.graph = graph
        self.count = Counter(node.target for node in graph.nodes)
        graph.eliminate_dead_code()
        self.used = Counter(node.target for node in graph.nodes)

    def uuid(self):
        return None  # no cache: the pass has to run


def compiled_with(function, *passes):
    spy = Spy()
    torch._dynamo.reset()
    return torch.compile(function, options={"post_grad_custom_pre_pass": [*passes, spy]}), spy


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

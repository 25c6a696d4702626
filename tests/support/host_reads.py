"""What makes a host wait for a device, seen as operators."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# what makes a host wait for a device: reading a number, and sizes that depend on data
WAITS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten.unique_dim)


class Waits(TorchDispatchMode):
    """Collects operators that read data on the host. ``tolist`` of a tensor on the CPU is none of them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in WAITS:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))

"""machine_name: what measurements are kept under."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch


@functools.cache
def cpu_name() -> str:
    """As the operating system calls it, or its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine_name() -> str:
    """Processor, threads and torch version."""
    return f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"

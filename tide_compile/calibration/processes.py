"""processes: several of them, started by ``torchrun``, that share the texts of one calibration."""

from __future__ import annotations

import datetime
import os

import torch.distributed as dist


def join_processes() -> None:
    """Let the processes know each other, where there are several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))  # the first one fits alone


def rank_and_world() -> tuple[int, int]:
    """Which process this is, and how many there are: (0, 1) where it is alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first() -> bool:
    """Whether this is the process that fits what all have collected."""
    return rank_and_world()[0] == 0


def wait_for_all() -> None:
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()

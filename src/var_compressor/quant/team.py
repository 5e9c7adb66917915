"""Several processes that quantize one model together, started by torchrun.

Recordings and linears are shared out; what is exchanged lies in host memory, so that the result is
the same bytes for any number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
_MEETINGS = count()


@dataclass(frozen=True)
class Team:
    """This process's number among ``size``; ``store`` holds what all of them see at once."""

    rank: int = 0
    size: int = 1
    store: dist.Store | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mine(self, count: int) -> list[int]:
        """Which of ``count`` recordings are this process's."""
        return list(range(self.rank, count, self.size))

    def owners(self, costs: Sequence[int]) -> list[int]:
        """Which process does each of several jobs: the costliest first, to the least busy one."""
        loads = [0] * self.size
        owner = [0] * len(costs)
        for job in sorted(range(len(costs)), key=lambda j: (-costs[j], j)):
            owner[job] = loads.index(min(loads))
            loads[owner[job]] += costs[job]
        return owner

    def merged(self, mine: dict[int, T]) -> dict[int, T]:
        """Everybody's entries, by ascending key."""
        parts = self._gather(mine) if self.size > 1 else [mine]
        return dict(sorted((key, value) for part in parts for key, value in part.items()))

    def told_by_first(self, value: T) -> T:
        """What the first process passes."""
        return value if self.size == 1 else self._gather(value)[0]

    def _gather(self, value: T) -> list[T]:
        parts: list = [None] * self.size
        dist.all_gather_object(parts, value)
        return parts


SOLO = Team()


@contextmanager
def team_of_environment() -> Iterator[Team]:
    """The processes that torchrun started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SOLO
        return
    # a block of the largest model may take one process much longer than another
    timeout = timedelta(hours=2)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    # a store is kept, with the addresses of the team before, when torchrun starts processes again
    # and when a process meets its like a second time
    meeting = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-{next(_MEETINGS)}"
    store = dist.PrefixStore(meeting, store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield Team(rank, size, store)
    finally:
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process among those of its machine.

    Raises: ValueError when torchrun started more processes than there are GPUs.
    """
    if device != torch.device("cuda"):
        return device
    number, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= num_gpus:
        raise ValueError(
            f"process {number} of this machine has no GPU: there are {num_gpus}; start "
            f"torchrun with --nproc-per-node {num_gpus}, or give --device cpu"
        )
    return torch.device("cuda", number)

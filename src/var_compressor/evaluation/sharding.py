"""Work shared out among the processes that torchrun started, or done by this one alone.

Jobs are taken from a common counter, so that a slow process holds no other up, and processes need
no common disk. What they found is put together exactly: every number comes from one process, and
bits are added to zeros.

Shapes: N images, F numbers per image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from var_compressor.quant.team import Team, team_of_environment

T = TypeVar("T")
_INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32}


class ProcessLost(ConnectionError):
    """Another process of this run has died; the message says what to do."""


@dataclass
class Crew:
    """This process and those that it works with.

    ``device``: where rows are added up, over NCCL when it is a GPU and over gloo otherwise.
    """

    team: Team
    device: torch.device
    group: dist.ProcessGroup | None = None
    _alone: dict[str, int] = field(default_factory=dict)
    _num_queues: int = 0

    @property
    def rank(self) -> int:
        return self.team.rank

    @property
    def size(self) -> int:
        return self.team.size

    @property
    def is_first(self) -> bool:
        return self.team.is_first

    def queue(self, num_jobs: int) -> Queue:
        """A queue that all processes take from; all make the same ones in the same order."""
        self._num_queues += 1
        return Queue(self, f"queue-{self._num_queues}", num_jobs)

    def counted(self, name: str, more: int) -> int:
        """Add to a number that all processes count together, and see it."""
        store = self.team.store
        if store is None:
            self._alone[name] = self._alone.get(name, 0) + more
            return self._alone[name]
        return self._together(lambda: int(store.add(name, more)))

    def merged(self, mine: Mapping[Any, T]) -> dict[Any, T]:
        """Everybody's entries, by ascending key."""
        return self._together(lambda: self.team.merged(dict(mine)))

    def gathered(self, mine: T) -> list[T]:
        """What every process passes, by rank."""
        found = self.merged({self.rank: mine})
        return [found[rank] for rank in range(self.size)]

    def told(self, by_first: Callable[[], T]) -> T:
        """What the first process finds; the others do not look for it.

        Raises: ValueError or OSError, what the first process ran into, on all.
        """
        value: Any = None
        problem: Exception | None = None
        if self.is_first:
            try:
                value = by_first()
            except (ValueError, OSError) as error:
                problem = error
        value, problem = self._together(lambda: self.team.told_by_first((value, problem)))
        if problem is not None:
            raise problem
        return value

    def whole(self, mine: Mapping[int, Tensor], num_rows: int) -> Tensor | None:
        """All rows ``[N]`` or ``[N, F]`` on the CPU, of which each process has some by number.

        None when nobody has any. Rows that nobody has are zeros.
        """
        like = next(iter(mine.values()), None)
        known = [
            one
            for one in self.gathered(None if like is None else (tuple(like.shape), like.dtype))
            if one is not None
        ]
        if not known:
            return None
        shape, dtype = known[0]
        rows = torch.zeros(num_rows, *shape, dtype=dtype)
        for index, row in mine.items():
            rows[index] = row
        if self.size == 1:
            return rows
        # as integers: what is added to a zero stays what it is, to the bit
        bits = rows.view(_INTEGERS[dtype]).to(self.device)
        self._together(lambda: dist.all_reduce(bits, group=self.group))
        return bits.cpu().view(dtype)

    def _together(self, step: Callable[[], T]) -> T:
        try:
            return step()
        except RuntimeError as error:
            if self.size == 1:
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ProcessLost(
                f"process {self.rank} of {self.size}: another process of this run has died "
                f"({reason}); finished images are kept, start the same command again"
            ) from error


@dataclass(frozen=True)
class Queue:
    """Jobs by number, each given to one process once it has time."""

    crew: Crew
    name: str
    num_jobs: int

    def __iter__(self) -> Iterator[int]:
        while (job := self.crew.counted(f"{self.name}/next", 1) - 1) < self.num_jobs:
            yield job

    def finish(self, num_done: int) -> int:
        """How much all processes have done, this included."""
        return self.crew.counted(f"{self.name}/done", num_done)


@contextmanager
def crew_of_environment(device: torch.device) -> Iterator[Crew]:
    """The processes that torchrun started, one for each GPU, or this one alone."""
    with team_of_environment() as team:
        if team.size == 1:
            yield Crew(team, device)
            return
        group = None
        if device.type == "cuda":
            torch.cuda.set_device(device)
            group = dist.new_group(backend="nccl")
        yield Crew(team, device, group)

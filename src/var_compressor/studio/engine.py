"""The queue before the models: bounded, fair, cancellable; one thread draws for each device.

It knows nothing of images: a worker is a function ``work(order, report) -> result``, and what it
reports and returns are values that a `Job` hands on. A finished job is held by whoever asked for
it and by nobody else, so memory is bounded by the jobs that wait or run.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

OrderT = TypeVar("OrderT")
Report = Callable[[Any], None]
Work = Callable[[OrderT, Report], Any]

INTERNAL_ERROR = "something went wrong in the studio; its terminal tells more"


class QueueFullError(ValueError):
    """The queue holds as many jobs as it may."""


class CancelledError(Exception):
    """Raised inside a worker, by its report, once somebody has cancelled the job."""


class State(Enum):
    """What became of a job so far."""

    waiting = "waiting"
    running = "running"
    done = "done"
    cancelled = "cancelled"
    failed = "failed"

    @property
    def is_final(self) -> bool:
        return self not in (State.waiting, State.running)


@dataclass(frozen=True)
class Snapshot:
    """A job at one moment. ``position`` counts from 1, 0 when it does not wait any more.

    ``latest``: what the worker reported last; ``result``: what it returned, once done.
    """

    state: State
    position: int
    latest: Any
    result: Any
    message: str


class Job(Generic[OrderT]):
    """An order on its way. Made by `Engine.submit`; safe to read from any thread."""

    def __init__(self, engine: Engine[OrderT], order: OrderT, owner: str) -> None:
        self.order, self.owner = order, owner
        self._engine = engine
        self._state = State.waiting
        self._latest: Any = None
        self._result: Any = None
        self._message = ""
        self._cancelled = False

    def snapshot(self) -> Snapshot:
        with self._engine._changed:
            return Snapshot(
                self._state,
                self._engine._position(self),
                self._latest,
                self._result,
                self._message,
            )

    def wait(self, timeout: float | None = None) -> Snapshot:
        """Block until the job is final, or ``timeout`` seconds have passed."""
        with self._engine._changed:
            self._engine._changed.wait_for(lambda: self._state.is_final, timeout)
        return self.snapshot()

    def cancel(self) -> None:
        """At once while it waits; a running one stops at its next report."""
        self._engine._cancel(self)


class Engine(Generic[OrderT]):
    """Takes orders and has its workers do them, first come, first served."""

    def __init__(self, workers: Sequence[Work[OrderT]], *, max_waiting: int) -> None:
        """``workers``: one per device; ``max_waiting``: jobs that may wait beside those that run.

        Raises: ValueError without a worker, or for a queue that takes nothing.
        """
        if not workers or max_waiting < 1:
            raise ValueError(f"{len(workers)} workers, room for {max_waiting} jobs: give both")
        self.max_waiting = max_waiting
        self._changed = threading.Condition()
        self._waiting: deque[Job[OrderT]] = deque()
        self._running: set[Job[OrderT]] = set()
        self._closed = False
        self._seconds = 0.0
        self._threads = [
            threading.Thread(target=self._serve, args=(work,), name=f"studio-{i}", daemon=True)
            for i, work in enumerate(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, order: OrderT, owner: str) -> Job[OrderT]:
        """Put an order at the queue's end. Raises: QueueFullError, which says how full it is."""
        job = Job(self, order, owner)
        with self._changed:
            if self._closed:
                raise QueueFullError("the studio is closing down")
            if len(self._waiting) >= self.max_waiting:
                raise QueueFullError(
                    f"the queue is full: {len(self._waiting)} drawings wait already; "
                    f"try again in {self._turn_seconds():.0f} seconds"
                )
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def cancel_all_of(self, owner: str) -> None:
        """Every job of one visitor."""
        with self._changed:
            jobs = [job for job in (*self._waiting, *self._running) if job.owner == owner]
        for job in jobs:
            job.cancel()

    @property
    def capacity(self) -> int:
        """The most jobs that wait or run at a time."""
        return self.max_waiting + len(self._threads)

    @property
    def num_waiting(self) -> int:
        with self._changed:
            return len(self._waiting)

    @property
    def num_running(self) -> int:
        with self._changed:
            return len(self._running)

    def close(self, timeout: float = 10.0) -> None:
        """Cancel everything and wait for the workers to stop."""
        with self._changed:
            self._closed = True
            jobs = [*self._waiting, *self._running]
            self._changed.notify_all()
        for job in jobs:
            job.cancel()
        for thread in self._threads:
            thread.join(timeout)

    def _turn_seconds(self) -> float:
        """About how long until somebody's turn comes: the last job's time, a worker's share."""
        return max(1.0, self._seconds / len(self._threads))

    def _position(self, job: Job[OrderT]) -> int:
        return self._waiting.index(job) + 1 if job in self._waiting else 0

    def _cancel(self, job: Job[OrderT]) -> None:
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._finish(job, State.cancelled)
            elif job in self._running:
                job._cancelled = True

    def _serve(self, work: Work[OrderT]) -> None:
        while (job := self._next()) is not None:
            began = time.perf_counter()
            state, result, message = self._outcome(work, job)
            with self._changed:
                self._running.discard(job)
                self._seconds = time.perf_counter() - began
                job._result, job._message = result, message
                self._finish(job, state)
            # the next job may be hours away, and this one's images are large
            del job, result

    def _next(self) -> Job[OrderT] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            job = self._waiting.popleft()
            job._state = State.running
            self._running.add(job)
            self._changed.notify_all()
            return job

    def _outcome(self, work: Work[OrderT], job: Job[OrderT]) -> tuple[State, Any, str]:
        def report(latest: Any) -> None:
            with self._changed:
                if job._cancelled:
                    raise CancelledError
                job._latest = latest
                self._changed.notify_all()

        try:
            return State.done, work(job.order, report), ""
        except CancelledError:
            return State.cancelled, None, ""
        except (ValueError, OSError) as error:
            # written for whoever asked; see cli.app, which prints the same ones
            return State.failed, None, " ".join(str(error).split())
        except Exception:
            # one job's fault must not end the thread that all others wait for
            traceback.print_exc(file=sys.stderr)
            return State.failed, None, INTERNAL_ERROR

    def _finish(self, job: Job[OrderT], state: State) -> None:
        job._state = state
        job._latest = None
        self._changed.notify_all()

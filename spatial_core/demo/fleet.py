"""Takes pictures on all cores: camera cars that are processes of their own.

They are plain children that read jobs from a pipe and end when it does, not `multiprocessing` workers: those import the
calling program anew, which starts a script without a `__main__` guard again, and outlive a parent that is killed.
"""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue
from types import TracebackType
from typing import IO, Self

from spatial_core.demo.camera_car import Job, Shot, take
from spatial_core.errors import StageFailed
from spatial_core.storage.hardware import usable_cores

_AHEAD = 4
_WORTH_PROCESSES = 32


class Fleet:
    """Camera cars, started with the first long list of jobs and ended with the block."""

    def __init__(self) -> None:
        self._cores = usable_cores()
        self._cars: list[subprocess.Popen[bytes]] = []
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for car in self._cars:
            if error is not None:
                car.kill()
            car.communicate()

    def take_all(self, jobs: Sequence[Job]) -> Iterator[list[Shot]]:
        """`take` every job, in order, with a bounded number of jobs waiting to be collected.

        Raises:
            StageFailed: if a camera car ended before its job.
        """
        if not self._cars and (self._cores == 1 or len(jobs) < _WORTH_PROCESSES):
            yield from map(take, jobs)
            return
        self._start()
        queue = iter(jobs)
        with ThreadPoolExecutor(self._cores) as threads:
            running: deque[Future[list[Shot]]] = deque()
            try:
                for job in islice(queue, _AHEAD * self._cores):
                    running.append(threads.submit(self._ask, job))
                while running:
                    yield running.popleft().result()
                    for job in islice(queue, 1):
                        running.append(threads.submit(self._ask, job))
            finally:
                for future in running:
                    future.cancel()

    def _start(self) -> None:
        while len(self._cars) < self._cores:
            command = [sys.executable, "-m", "spatial_core.demo.fleet"]
            car = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._cars.append(car)
            self._idle.put(car)

    def _ask(self, job: Job) -> list[Shot]:
        """Have whichever car is idle take a job's pictures; there are as many threads as cars."""
        car = self._idle.get()
        try:
            stdin, stdout = _pipes(car)
            pickle.dump(job, stdin)
            stdin.flush()
            shots: list[Shot] = pickle.load(stdout)  # noqa: S301 (written by our own child)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise StageFailed(
                f"a process taking pictures of the demo city ended with exit code {car.wait()}; run again"
            ) from error
        finally:
            self._idle.put(car)
        return shots


def _pipes(car: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    if car.stdin is None or car.stdout is None:
        raise StageFailed("a process taking pictures of the demo city has no pipes")
    return car.stdin, car.stdout


def serve(jobs: IO[bytes], shots: IO[bytes]) -> None:
    """What a camera car does: one answer for every job, until the jobs end."""
    while True:
        try:
            job = pickle.load(jobs)  # noqa: S301 (written by our own parent)
        except EOFError:
            return
        pickle.dump(take(job), shots)
        shots.flush()


if __name__ == "__main__":
    # Ctrl-C reaches the whole process group; it is the parent that ends the cars.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(sys.stdin.buffer, sys.stdout.buffer)

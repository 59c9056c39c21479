"""SIGTERM to a process: at once, or when the piece in hand is finished."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from spatial_core import interruption

WORKER = """
import contextlib, sys, time
from spatial_core.interruption import obey_termination, resumable, stop_here
from spatial_core.errors import Interrupted
obey_termination()
kind, pieces, piece_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
try:
    with resumable() if kind == "resumable" else contextlib.nullcontext():
        for piece in range(pieces):
            stop_here(f"{piece} of {pieces} pieces are finished")
            print("began", piece, flush=True)
            end = time.monotonic() + piece_s
            while time.monotonic() < end:
                time.sleep(0.01)
            print("ended", piece, flush=True)
except Interrupted as error:
    print(error, flush=True)
    time.sleep(1)  # telling somebody takes a while, and may not be disturbed
    print("told", flush=True)
    sys.exit(75)
finally:
    print("cleaned up", flush=True)
"""


@contextmanager
def worker(kind: str, pieces: int, piece_s: float) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", WORKER, kind, str(pieces), str(piece_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "began 0\n"
            yield process
        finally:
            process.kill()


def rest(process: subprocess.Popen[str]) -> list[str]:
    return process.communicate(timeout=30)[0].splitlines()


def test_a_resumable_piece_is_finished_first() -> None:
    with worker("resumable", 5, 0.5) as process:
        process.send_signal(signal.SIGTERM)
        assert rest(process) == [
            "ended 0",
            "stopped when asked to, 1 of 5 pieces are finished; run again to go on from there",
            "told",
            "cleaned up",
        ]
    assert process.returncode == 75


def test_a_request_that_arrives_twice_is_one_request() -> None:
    """From the scheduler and from the launcher in between; also while the outcome is being told."""
    with worker("resumable", 5, 1.0) as process:
        for _ in range(15):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        assert rest(process)[-2:] == ["told", "cleaned up"]
    assert process.returncode == 75


def test_a_second_request_acts_at_once() -> None:
    with worker("resumable", 5, 60) as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(interruption.SAME_REQUEST_S + 0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert rest(process) == ["cleaned up"]
    assert process.returncode == 128 + signal.SIGTERM


def test_work_without_pieces_ends_at_once() -> None:
    with worker("whole", 1, 60) as process:
        process.send_signal(signal.SIGTERM)
        assert rest(process) == ["cleaned up"]
    assert process.returncode == 128 + signal.SIGTERM


def test_a_request_after_the_last_piece_changes_nothing() -> None:
    with worker("resumable", 1, 0.5) as process:
        process.send_signal(signal.SIGTERM)
        assert rest(process) == ["ended 0", "cleaned up"]
    assert process.returncode == 0


@pytest.mark.parametrize(("own", "asked", "stops"), [(False, None, False), (True, None, True), (False, True, True)])
def test_who_was_asked_may_be_somebody_else(
    monkeypatch: pytest.MonkeyPatch, own: bool, asked: bool | None, stops: bool
) -> None:
    monkeypatch.setattr(interruption, "_stop", interruption._Stop())
    if own:
        interruption.request_stop()
    assert interruption.stop_requested() == own
    if stops:
        with pytest.raises(interruption.Interrupted, match="3 of 4"):
            interruption.stop_here("3 of 4", asked=asked)
    else:
        interruption.stop_here("3 of 4", asked=asked)

"""What a job says it used."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from typing import Any

import pynvml
import pytest

from spatial_core.jobs.gpu_usage import GpuSampler, open_gpus
from spatial_core.jobs.usage import UsageMeter, slurm_identity
from spatial_core.storage.hardware import usable_cores

BURN = "import time; end = time.process_time() + 0.5\nwhile time.process_time() < end: sum(range(1000))"


def test_time_and_memory_of_the_process_and_its_children() -> None:
    with UsageMeter() as usage:
        before = usage.record()
        block = bytearray(os.urandom(1 << 20) * 64)
        subprocess.run([sys.executable, "-c", BURN], check=True)
        time.sleep(0.2)
    record = usage.record()
    json.dumps(record, allow_nan=False)
    assert 0.5 <= record["cpu_s"] - before["cpu_s"] < 5
    assert 0.7 <= record["wall_s"] < 30
    assert record["wall_s"] == usage.record()["wall_s"], "the clock stops at the end of the block"
    assert record["peak_rss_bytes"] >= before["peak_rss_bytes"] > 10 << 20
    assert record["peak_rss_bytes"] > len(block)
    assert 5 << 20 < record["peak_child_rss_bytes"] < 4 << 30
    assert (record["host"], record["cores"]) == (socket.gethostname(), usable_cores())


def test_the_job_is_named_as_slurm_names_it() -> None:
    environment = {
        "SLURM_JOB_ID": "33",
        "SLURM_ARRAY_JOB_ID": "31",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_RESTART_COUNT": "1",
        "SLURM_JOB_PARTITION": "gpu",
        "SLURMD_NODENAME": "node2",
    }
    assert slurm_identity(environment) == {
        "job_id": "33",
        "array_job_id": "31",
        "array_task_id": "2",
        "restart_count": "1",
        "partition": "gpu",
        "node": "node2",
    }
    assert set(slurm_identity({}).values()) == {None}


@pytest.mark.parametrize("given", ["", "2"])
def test_a_job_that_was_given_gpus_but_sees_none_says_so(
    given: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", given)
    with caplog.at_level(logging.INFO, "spatial_core"), UsageMeter(every_s=0.01) as usage:
        time.sleep(0.1)
    assert (usage.record()["gpus"], usage.record()["gpu_utilisation"]) == ([], None)
    said = ["no GPU figures: CUDA_VISIBLE_DEVICES shows none to this job"]
    assert [record.message for record in caplog.records] == (said if given else [])


def test_the_driver_of_this_machine_is_asked() -> None:
    """With a driver there are figures, without one the reason; never an exception."""
    opened = open_gpus({})
    if isinstance(opened, str):
        assert opened.startswith(("NVML says: ", "the driver shows no GPU"))
    else:
        opened.look()
        assert all(0 <= gpu["utilisation_max_pct"] <= 100 for gpu in opened.record())


class Rates:
    def __init__(self, gpu: int) -> None:
        self.gpu = gpu


class Memory:
    def __init__(self, used: int) -> None:
        self.used, self.total = used, 1000


class Library:
    """As much of NVML as is asked, for two GPUs whose figures change from look to look; the second has no rates."""

    NVMLError = pynvml.NVMLError

    def __init__(self) -> None:
        self.looks = 0

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index > 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return int(uuid[-1])

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "Some GPU"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Memory:
        return Memory([300, 700, 100][self.looks])

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Rates:
        if handle == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return Rates([0, 90, 60][self.looks])


class Busy(Library):
    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Rates:
        return Rates([40, 80][handle])


def test_samples_become_means_and_peaks() -> None:
    library = Library()
    sampler = open_gpus({}, library)
    assert isinstance(sampler, GpuSampler)
    for library.looks in range(3):
        sampler.look()
    first, second = sampler.record()
    assert first == {
        "uuid": "GPU-0",
        "name": "Some GPU",
        "utilisation_mean_pct": 50.0,
        "utilisation_max_pct": 90.0,
        "memory_peak_bytes": 700,
        "memory_total_bytes": 1000,
        "samples": 3,
    }
    assert (second["utilisation_mean_pct"], second["utilisation_max_pct"]) == (None, None)
    assert (second["memory_peak_bytes"], second["samples"]) == (700, 0)


def test_gpus_are_looked_at_while_the_job_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spatial_core.jobs.usage.open_gpus", lambda environ: open_gpus(environ, Busy()))
    with UsageMeter(every_s=0.01) as usage:
        time.sleep(0.2)
    record = usage.record()
    assert [gpu["utilisation_mean_pct"] for gpu in record["gpus"]] == [40.0, 80.0]
    assert all(3 <= gpu["samples"] <= 25 for gpu in record["gpus"])
    assert record["gpu_utilisation"] == 0.6


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, ["GPU-0", "GPU-1"]), ("1", ["GPU-1"]), ("GPU-1, GPU-0", ["GPU-1", "GPU-0"])]
)
def test_the_visible_gpus_are_the_ones_looked_at(visible: str | None, expected: list[str]) -> None:
    environment: dict[str, Any] = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    sampler = open_gpus(environment, Library())
    assert isinstance(sampler, GpuSampler)
    assert [gpu["uuid"] for gpu in sampler.record()] == expected


@pytest.mark.parametrize("visible", ["", "-1", "7"])
def test_gpus_that_cannot_be_seen_are_no_error(visible: str) -> None:
    assert isinstance(open_gpus({"CUDA_VISIBLE_DEVICES": visible}, Library()), str)

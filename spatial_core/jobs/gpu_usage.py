"""Utilisation and memory of the GPUs a job may use, through NVIDIA's management library (NVML)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pynvml

_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass
class _Gpu:
    """Running figures of one GPU; what the driver does not tell for it stays None."""

    handle: Any
    uuid: str
    name: str
    total_bytes: int | None = None
    peak_bytes: int | None = None
    busy_sum: float = 0.0
    busy_max: float | None = None
    looks: int = 0


class GpuSampler:
    """Looks at GPUs from time to time.

    Args:
        handles: NVML device handles.
        nvml: the library, already initialised.
    """

    def __init__(self, handles: list[Any], nvml: Any = pynvml) -> None:
        self._nvml = nvml
        self._gpus = [
            _Gpu(handle, nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)) for handle in handles
        ]

    def look(self) -> None:
        """Take one sample of every GPU."""
        for gpu in self._gpus:
            memory = self._ask(self._nvml.nvmlDeviceGetMemoryInfo, gpu)
            if memory is not None:
                gpu.total_bytes = int(memory.total)
                gpu.peak_bytes = max(gpu.peak_bytes or 0, int(memory.used))
            rates = self._ask(self._nvml.nvmlDeviceGetUtilizationRates, gpu)
            if rates is not None:
                gpu.busy_sum += float(rates.gpu)
                gpu.busy_max = max(gpu.busy_max or 0.0, float(rates.gpu))
                gpu.looks += 1

    def record(self) -> list[dict[str, Any]]:
        """One record a GPU: uuid, name, utilisation (mean and largest, percent), memory (most in use, and there is).

        Memory in use is everybody's on that GPU.
        """
        return [
            {
                "uuid": gpu.uuid,
                "name": gpu.name,
                "utilisation_mean_pct": round(gpu.busy_sum / gpu.looks, 1) if gpu.looks else None,
                "utilisation_max_pct": gpu.busy_max,
                "memory_peak_bytes": gpu.peak_bytes,
                "memory_total_bytes": gpu.total_bytes,
                "samples": gpu.looks,
            }
            for gpu in self._gpus
        ]

    def _ask(self, question: Any, gpu: _Gpu) -> Any:
        try:
            return question(gpu.handle)
        except self._nvml.NVMLError:  # a part of a GPU (MIG) has no utilisation, a lost one nothing
            return None


def open_gpus(environ: Mapping[str, str], nvml: Any = pynvml) -> GpuSampler | str:
    """A sampler of the GPUs this process may use, or why there is none.

    Args:
        environ: `CUDA_VISIBLE_DEVICES` in it names GPUs by number or UUID; unset, all that the driver shows are meant.
        nvml: NVIDIA's management library.
    """
    visible = environ.get(_VISIBLE)
    if visible is not None and visible.strip() in {"", "-1", "none", "NoDevFiles"}:
        return f"{_VISIBLE} shows none to this job"
    try:
        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
        if visible is None:
            handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        else:
            handles = [_handle(nvml, name.strip()) for name in visible.split(",")]
        return GpuSampler(handles, nvml) if handles else "the driver shows no GPU"
    except nvml.NVMLError as error:
        return f"NVML says: {error}"


def _handle(nvml: Any, name: str) -> Any:
    return nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else nvml.nvmlDeviceGetHandleByUUID(name)

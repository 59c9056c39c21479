"""Ours beside the reference method, in one run: what every benchmark script is written with.

A contender runs alone in a fresh process, ours and the reference taking turns, so that neither inherits the other's
caches, memory or imports and both meet the same noise of a shared machine. Wall time, CPU seconds and peak memory are
measured around the work itself; imports and `Prepared.setup` are not timed.

A script holds top-level functions and one `rows`:

    def rows(scale: float = 1.0) -> list[Row]:
        return [compare("merge", "rows", partial(ours, path), partial(reference, path), items=200_000, target=5)]

    if __name__ == "__main__":
        main(rows)
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from spatial_core.storage.hardware import usable_cores

RESULTS = Path(__file__).parent / "results"
_SAMPLE_S = 0.02
# Meant for the BLAS of some library, they reach every OpenBLAS of a process and can make a current one slower.
_BLAS_OVERRIDES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


@dataclass(frozen=True)
class Prepared:
    """A contender whose preparation (loading a model, generating data) is not timed: `run(setup())` is."""

    setup: Callable[[], Any]
    run: Callable[[Any], Any]


# A function without arguments that a fresh process can import: top-level, or a `functools.partial` of one. A mapping
# it returns (checks, accuracies) is kept beside the figures.
Contender = Callable[[], Any] | Prepared


@dataclass(frozen=True)
class Cost:
    """What one contender took: medians over rounds, the peak being the highest of any round.

    Args:
        items: things it worked on in one round.
        wall_s: wall time of a round, seconds.
        cpu_s: CPU seconds of a round, children included.
        peak_mb: private memory (no mapped file pages) of the process and its children, MB of 1e6 bytes.
        rounds_s: wall time of every round.
        figures: what the contender returned in its last round.
    """

    items: int
    wall_s: float
    cpu_s: float
    peak_mb: float
    rounds_s: tuple[float, ...]
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Items a second."""
        return self.items / self.wall_s


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        stage: what was measured.
        unit: what is counted (images, rows, triplets).
        ours: our cost.
        reference: cost of the reference method.
        target: ratio that was aimed at; None where there is none.
        note: why a target was missed, or what differs between the two.
    """

    stage: str
    unit: str
    ours: Cost
    reference: Cost
    target: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        """Throughput of ours over that of the reference."""
        return self.ours.rate / self.reference.rate

    @property
    def cpu_ratio(self) -> float:
        """The same by CPU seconds an item: what is gained without more cores."""
        return (self.reference.cpu_s / self.reference.items) / (self.ours.cpu_s / self.ours.items)

    @property
    def verdict(self) -> str:
        """`met`, or by how much the target was missed."""
        if self.target is None:
            return ""
        return "met" if self.ratio >= self.target else f"missed by {100 * (1 - self.ratio / self.target):.0f} %"

    def to_json(self) -> dict[str, Any]:
        """All figures, JSON-serialisable."""
        return {**asdict(self), "ratio": self.ratio, "cpu_ratio": self.cpu_ratio, "verdict": self.verdict}


def compare(  # noqa: PLR0917 - the short form reads as one line of the table
    stage: str,
    unit: str,
    ours: Contender,
    reference: Contender,
    items: int,
    rounds: int = 3,
    target: float | None = None,
    *,
    reference_items: int | None = None,
    note: str = "",
) -> Row:
    """Run both contenders `rounds` times, taking turns.

    Args:
        stage: name of the line.
        unit: what `items` counts.
        ours: picklable callable, see `Contender`.
        reference: the same for the reference method.
        items: things one round of ours works on.
        rounds: rounds of each.
        target: ratio aimed at.
        reference_items: things one round of the reference works on, when it gets fewer because it is slow.
        note: shown in the table.

    Raises:
        RuntimeError: with the traceback, if a contender fails.
    """
    samples: dict[str, list[dict[str, Any]]] = {"ours": [], "reference": []}
    for turn in range(rounds):
        order = (("ours", ours), ("reference", reference))
        for name, contender in order if turn % 2 == 0 else reversed(order):
            samples[name].append(measure(contender))
    return Row(
        stage,
        unit,
        _cost(samples["ours"], items),
        _cost(samples["reference"], items if reference_items is None else reference_items),
        target,
        note,
    )


def measure(contender: Contender) -> dict[str, Any]:
    """Run a contender once in a fresh process: wall_s, cpu_s, peak_mb, figures.

    Raises:
        RuntimeError: with the traceback, if it fails.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_contend, args=(there, contender))
    with _without(_BLAS_OVERRIDES):
        process.start()
    there.close()
    peak = 0
    while not here.poll(_SAMPLE_S) and process.is_alive():
        peak = max(peak, _private_bytes(process.pid))
    try:
        outcome: dict[str, Any] = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{contender}: its process ended with exit code {process.exitcode}") from None
    process.join()
    if "error" in outcome:
        raise RuntimeError(f"{contender} failed:\n{outcome['error']}")
    # The kernel's own high-water mark sees peaks shorter than a sample; it counts mapped file pages too, so it only
    # stands in when the work was over before the first sample.
    outcome["peak_mb"] = (peak or outcome.pop("high_water_bytes")) / 1e6
    return outcome


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """The environment without some variables, which children started inside the block do not inherit."""
    held = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


def _contend(channel: Connection, contender: Contender) -> None:
    import traceback

    try:
        if isinstance(contender, Prepared):
            prepared = contender.setup()
            run: Callable[[], Any] = lambda: contender.run(prepared)  # noqa: E731
        else:
            run = contender
        gc.collect()
        cpu = _cpu_seconds()
        start = time.perf_counter()
        figures = run()
        wall = time.perf_counter() - start
        channel.send(
            {
                "wall_s": wall,
                "cpu_s": _cpu_seconds() - cpu,
                "figures": dict(figures) if isinstance(figures, Mapping) else {},
                "high_water_bytes": _status(os.getpid()).get("VmHWM", 0),
            }
        )
    except BaseException:  # noqa: BLE001 - handed to the parent, which raises it
        channel.send({"error": traceback.format_exc()})


def _cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _status(pid: int) -> dict[str, int]:
    """Sizes of /proc/PID/status in bytes; empty once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def _private_bytes(pid: int | None) -> int:
    total, todo = 0, [pid] if pid else []
    while todo:
        current = todo.pop()
        status = _status(current)
        total += status.get("RssAnon", 0) + status.get("RssShmem", 0)
        try:
            for task in Path(f"/proc/{current}/task").iterdir():
                todo += [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # it ended between two looks
            continue
    return total


def _cost(samples: Sequence[Mapping[str, Any]], items: int) -> Cost:
    return Cost(
        items=items,
        wall_s=statistics.median(sample["wall_s"] for sample in samples),
        cpu_s=statistics.median(sample["cpu_s"] for sample in samples),
        peak_mb=max(sample["peak_mb"] for sample in samples),
        rounds_s=tuple(sample["wall_s"] for sample in samples),
        figures=samples[-1]["figures"],
    )


def cpu_model() -> str:
    """The processor as the kernel names it, and what of it decides how fast bf16 products are."""
    pairs = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    fields = {name.strip(): value.strip() for name, value in pairs}
    flags = fields.get("flags", "").split()
    bf16 = [name for name in ("avx512_bf16", "amx_bf16") if name in flags]
    return f"{fields.get('model name', platform.machine())} ({', '.join(bf16) or 'no bf16 products'})"


def table(rows: Sequence[Row]) -> Table:
    """The rows as a printable table."""
    shown = Table(title=f"ours beside the reference method, {usable_cores()} cores of {cpu_model()}")
    if overrides := [name for name in _BLAS_OVERRIDES if name in os.environ]:
        shown.caption = f"run without {' and '.join(overrides)}, which this environment sets"
    for name in ("stage", "unit"):
        shown.add_column(name)
    for name in ("ours /s", "reference /s", "ratio", "per CPU s", "target", "ours MB", "reference MB"):
        shown.add_column(name, justify="right")
    shown.add_column("verdict")
    for row in rows:
        shown.add_row(
            row.stage,
            row.unit,
            f"{row.ours.rate:,.4g}",
            f"{row.reference.rate:,.4g}",
            f"{row.ratio:.2f}",
            f"{row.cpu_ratio:.2f}",
            "" if row.target is None else f"{row.target:g}",
            f"{row.ours.peak_mb:,.0f}",
            f"{row.reference.peak_mb:,.0f}",
            "; ".join(part for part in (row.verdict, row.note) if part),
        )
    return shown


def save(rows: Sequence[Row], name: str) -> Path:
    """Write `results/<name>.json`; returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    machine = {
        "cores": usable_cores(),
        "cpu": cpu_model(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "left_out_of_the_environment": [name for name in _BLAS_OVERRIDES if name in os.environ],
    }
    path.write_text(json.dumps({"machine": machine, "rows": [row.to_json() for row in rows]}, indent=2, default=str))
    return path


def main(rows: Callable[[float], list[Row]]) -> None:
    """Command line of a benchmark script: `--scale`, then the table on stdout and the JSON in `results/`."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(inspect.getmodule(rows)))
    parser.add_argument("--scale", type=float, default=1.0, help="size of the data relative to the usual run")
    parser.add_argument("--name", default=Path(inspect.getfile(rows)).stem, help="name of the results file")
    arguments = parser.parse_args()
    measured = rows(arguments.scale)
    Console(width=180).print(table(measured))
    print(f"written to {save(measured, arguments.name)}")

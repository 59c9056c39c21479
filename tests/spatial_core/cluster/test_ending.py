"""How a job ended, read from accounting, and the failure a user sees."""

from __future__ import annotations

from typing import Any

import pytest

from spatial_core import errors
from spatial_core.cluster.ending import TERMINAL, Ending, ending_of, failure_of, usage_record
from spatial_core.cluster.resources import Resources
from spatial_core.cluster.scheduler import Accounted
from spatial_core.jobs.messages import Said

ASKED = Resources(cpus=2, mem="4G", time_limit="02:00:00")
ROW = {
    "JobID": "12_3",
    "State": "COMPLETED",
    "ExitCode": "0:0",
    "ElapsedRaw": "65",
    "TotalCPU": "01:02.500",
    "CPUTimeRAW": "130",
    "MaxRSS": "",
    "NodeList": "node1",
    "AllocTRES": "billing=2,cpu=2,mem=4G,node=1",
    "ReqMem": "4G",
    "Submit": "2024-01-01T00:00:00",
    "Start": "2024-01-01T00:00:01",
    "End": "2024-01-01T00:01:06",
    "Partition": "cpu",
}


def accounted(*rss: str, **given: str) -> Accounted:
    return Accounted(ROW | given, tuple(ROW | {"JobID": f"12_3.{n}", "MaxRSS": text} for n, text in enumerate(rss)))


def ending(*rss: str, **given: str) -> Ending:
    return ending_of("12_3", accounted(*rss, **given))


def test_a_job_that_went_well() -> None:
    found = ending("1048576K")
    assert (found.state, found.exit_code, found.signal, found.node, found.partition) == (
        "COMPLETED",
        0,
        0,
        "node1",
        "cpu",
    )
    assert (found.elapsed_s, found.cpu_s, found.cores_s, found.gpus) == (65, 62.5, 130, 0)
    assert (found.memory_mb, found.memory_asked_mb) == (1024, 4096)
    assert (found.start, found.end) == (ROW["Start"], ROW["End"])


def test_the_largest_step_is_the_peak() -> None:
    assert ending("", "1G", "300M").memory_mb == 1024


@pytest.mark.parametrize(
    ("text", "mib"),
    [
        ("4G", 4096),
        ("4Gn", 4096),
        ("2Gc", 4096),
        ("1.50T", 1.5 * 2**20),
        ("512M", 512),
        ("2048K", 2),
        ("1048576", 1),
        ("0", None),
        ("0n", None),
        ("", None),
        ("?", None),
    ],
)
def test_memory_as_releases_of_slurm_write_it(text: str, mib: float | None) -> None:
    assert ending(ReqMem=text).memory_asked_mb == mib


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("00:00.123", 0.123),
        ("00:01:05", 65),
        ("2-03:04:05", 2 * 86400 + 3 * 3600 + 4 * 60 + 5),
        ("01:02.500", 62.5),
        ("", None),
        ("INVALID", None),
    ],
)
def test_processor_time(text: str, seconds: float | None) -> None:
    assert ending(TotalCPU=text).cpu_s == seconds


def test_gpus_are_those_allocated() -> None:
    assert ending(AllocTRES="billing=8,cpu=8,gres/gpu:h100=2,gres/gpu=2,mem=32G").gpus == 2
    assert ending(AllocTRES="").gpus == 0


def test_a_job_that_never_ran() -> None:
    found = ending(State="CANCELLED by 0", ElapsedRaw="0", NodeList="None assigned", AllocTRES="", TotalCPU="00:00:00")
    assert (found.state, found.node, found.elapsed_s) == ("CANCELLED", "", 0)


@pytest.mark.parametrize(
    ("state", "kind", "remedy"),
    [
        ("FAILED", errors.JobFailed, ""),
        ("OUT_OF_MEMORY", errors.JobOutOfMemory, "ask for more memory than 4G (compute.resources.merged_splits.mem)"),
        ("TIMEOUT", errors.JobTimedOut, "more time than 02:00:00 (compute.resources.merged_splits.time_limit)"),
        ("DEADLINE", errors.JobTimedOut, "--deadline"),
        ("PREEMPTED", errors.JobPreempted, "materialize again"),
        ("REVOKED", errors.JobPreempted, "materialize again"),
        ("CANCELLED by 1000", errors.JobCancelled, "scancel"),
        ("NODE_FAIL", errors.NodeFailed, "materialize again"),
        ("BOOT_FAIL", errors.NodeFailed, "materialize again"),
    ],
)
def test_every_bad_end_has_its_type_figures_and_remedy(state: str, kind: type[Exception], remedy: str) -> None:
    failure = failure_of(
        ending("1G", State=state, ExitCode="3:0"),
        "merged_splits",
        ASKED,
        "a\n\nb\n c \nd\ne\nf\n",
        Said(exception="ValueError: x"),
    )
    assert type(failure) is kind
    text = str(failure)
    word = state.replace(" by ", " by user ")
    how = "exit code 3, after 65 s, peak memory 1024 MiB of 4096, on node1"
    assert text.startswith(f"job 12_3 ended {word} ({how}); ValueError: x; ")
    assert text.endswith("last lines: b | c | d | e | f")
    assert remedy in text
    assert "\n" not in text


def test_all_terminal_states_but_one_are_failures() -> None:
    tested = {"FAILED", "OUT_OF_MEMORY", "TIMEOUT", "DEADLINE", "PREEMPTED", "REVOKED", "CANCELLED", "NODE_FAIL"}
    assert tested | {"BOOT_FAIL", "COMPLETED"} == TERMINAL
    assert not {"COMPLETING", "RUNNING", "PENDING", "REQUEUED", "SUSPENDED", "RESIZING", "STAGE_OUT"} & TERMINAL


def test_vanished_and_silent_ones() -> None:
    failure = failure_of(Ending("12_3", "VANISHED"), "merged_splits", ASKED, "", Said())
    assert type(failure) is errors.JobVanished
    assert "neither the queue nor the accounting knows it" in str(failure)
    assert str(failure).endswith("last lines: none")


@pytest.mark.parametrize(
    ("given", "rss", "expected"),
    [
        ({"State": "OUT_OF_MEMORY"}, (), True),
        ({"State": "FAILED", "ExitCode": "0:9"}, ("4100M",), True),
        ({"State": "FAILED", "ExitCode": "137:0"}, ("4000M",), True),
        ({"State": "FAILED", "ExitCode": "0:9"}, ("1G",), False),
        ({"State": "FAILED", "ExitCode": "0:9"}, (), False),
        ({"State": "FAILED", "ExitCode": "1:0"}, ("4100M",), False),
        ({"State": "COMPLETED"}, ("4100M",), False),
        ({"State": "FAILED", "ExitCode": "0:9", "ReqMem": ""}, ("4100M",), False),
    ],
)
def test_out_of_memory_with_and_without_control_groups(
    given: dict[str, str], rss: tuple[str, ...], expected: bool
) -> None:
    found = ending(*rss, **given)
    assert found.out_of_memory is expected
    failure = failure_of(found, "merged_splits", ASKED, "", Said())
    assert isinstance(failure, errors.JobOutOfMemory) is expected


def test_usage_is_time_times_what_was_allocated() -> None:
    found = ending("1G", AllocTRES="cpu=2,gres/gpu=2", ElapsedRaw="3600", CPUTimeRAW="7200")
    record: dict[str, Any] = usage_record(found, "backbone_embeddings", "0201", {"gpu_utilisation": 0.7}, (3.0, 0.5))
    assert (record["gpu_s"], record["core_s"], record["cost"]) == (7200, 7200, 2 * 3.0 + 2 * 0.5)
    assert (record["asset"], record["partition_key"], record["job"]) == ("backbone_embeddings", "0201", "12_3")
    assert record["gpu_utilisation"] == 0.7


def test_one_that_was_told_to_stop_says_how_far_it_got() -> None:
    said = Said(interrupted={"type": "Interrupted", "message": "3 of 9 pieces are finished"})
    failure = failure_of(ending(State="FAILED", ExitCode="75:0"), "merged_splits", ASKED, "", said)
    assert type(failure) is errors.JobTimedOut
    assert "3 of 9 pieces are finished" in str(failure)
    assert "ask for more time than 02:00:00" in str(failure)


def test_a_peak_that_the_job_measured_counts_where_accounting_saw_less() -> None:
    found = ending("100M")
    assert found.with_reported({"peak_rss_bytes": 300 << 20, "peak_child_rss_bytes": 200 << 20}).memory_mb == 300
    assert found.with_reported({"peak_rss_bytes": 50 << 20, "peak_child_rss_bytes": None}).memory_mb == 100
    assert ending().with_reported({}).memory_mb is None


def test_one_whose_stage_never_began_points_at_what_comes_before_it() -> None:
    found = ending(State="FAILED", ExitCode="1:0")
    assert "look at compute.setup" in str(failure_of(found, "merged_splits", ASKED, "no such module", Said()))
    assert "compute.setup" not in str(failure_of(found, "merged_splits", ASKED, "", Said(attempts=1)))

"""What a cluster says it has, and which jobs fit it."""

from __future__ import annotations

from typing import Any

import pytest

from spatial_core.cluster.facts import Node, Partition, largest, misfits, partitions
from spatial_core.cluster.resources import Resources
from spatial_core.cluster.scheduler import Scheduler
from spatial_core.errors import ClusterError

SMALL = Node(8, 32_768, {})
LARGE = Node(64, 515_072, {"h100": 4})
CPU = Partition("cpu", True, True, 86_400, (SMALL,))
GPU = Partition("gpu", False, True, None, (SMALL, LARGE))


class Said:
    """A transport on whose other side one command says one thing."""

    def __init__(self, out: str, code: int = 0, err: str = "") -> None:
        self._answer = {"code": code, "out": out, "err": err}

    def ask(self, request: Any) -> dict[str, Any]:
        assert request["do"] == "run" and request["argv"][0] == "sinfo"
        return self._answer


def scheduler(said: Said) -> Scheduler:
    return Scheduler(said, print, 1.0)


def test_partitions_are_read_with_all_their_kinds_of_nodes() -> None:
    out = (
        "cpu*|up|1-00:00:00|8|32768|(null)\n"
        "gpu|up|infinite|8+|32768+|(null)\n"
        "gpu|up|infinite|64|515072|gpu:h100:4(S:0-1),nvme:1\n"
        "mixed|down|30:00|16|64000|gpu:a100:2,gpu:v100:1\n"
        "plain|up|2:00:00|16|64000|gpu:8(S:0)\n"
    )
    found = partitions(scheduler(Said(out)))
    assert found["cpu"] == CPU
    assert found["gpu"] == GPU
    assert found["mixed"] == Partition("mixed", False, False, 1800, (Node(16, 64_000, {"a100": 2, "v100": 1}),))
    assert found["plain"].nodes[0].gpus == {"": 8} and found["plain"].limit_s == 7200


def test_a_silent_cluster_says_why() -> None:
    with pytest.raises(ClusterError, match="Unable to contact slurm controller"):
        partitions(
            scheduler(Said("", 1, "slurm_load_partitions: Unable to contact slurm controller (connect failure)"))
        )
    with pytest.raises(ClusterError, match="exit code 3"):
        partitions(scheduler(Said("", 3)))


@pytest.mark.parametrize(
    ("asked", "places", "lacking"),
    [
        ({}, [CPU], []),
        ({"mem": "32G"}, [CPU], []),
        ({"mem": "33G"}, [CPU], ["mem"]),
        ({"mem": "33G"}, [CPU, GPU], []),
        ({"cpus": 9, "mem": "1T"}, [CPU], ["cpus", "mem"]),
        ({"gpus": "1"}, [CPU], ["gpus"]),
        ({"gpus": "4"}, [GPU], []),
        ({"gpus": "5"}, [GPU], ["gpus"]),
        ({"gpus": "h100:4"}, [GPU], []),
        ({"gpus": "a100:1"}, [GPU], ["gpus"]),
        ({"time_limit": "24:00:00"}, [CPU], []),
        ({"time_limit": "1-00:01"}, [CPU], ["time_limit"]),
        ({"time_limit": "30-00"}, [CPU, GPU], []),
        ({"time_limit": "30-00", "gpus": "9"}, [CPU], ["gpus", "time_limit"]),
    ],
)
def test_what_a_job_asks_too_much_of(asked: dict[str, Any], places: list[Partition], lacking: list[str]) -> None:
    assert misfits(Resources(**{"cpus": 1, "mem": "1G", "time_limit": "01:00:00"} | asked), places) == lacking


def test_the_largest_nodes_are_named_first() -> None:
    assert largest([CPU, GPU]) == "64 cores, 503 GiB, 4 GPU h100; 8 cores, 32 GiB, no GPU"
    assert largest([]) == "none"

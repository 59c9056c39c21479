"""What a cluster says it has: partitions and their nodes, accounts, qualities of service; and whether a job fits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from spatial_core.cluster.resources import Resources, limit_seconds, megabytes
from spatial_core.cluster.scheduler import Scheduler
from spatial_core.errors import ClusterError

_GPU = re.compile(r"gpu(?::([A-Za-z0-9_.-]+))?:(\d+)")


@dataclass(frozen=True)
class Node:
    """A kind of node: cores, memory in MiB, GPUs by type (the empty type where nodes name none)."""

    cpus: int
    memory_mb: int
    gpus: Mapping[str, int]

    def __str__(self) -> str:
        gpus = ", ".join(f"{count} GPU {kind}".rstrip() for kind, count in self.gpus.items())
        return f"{self.cpus} cores, {self.memory_mb / 1024:.0f} GiB, {gpus or 'no GPU'}"

    def lacks(self, resources: Resources) -> list[str]:
        """Names of the settings that ask for more than the node has."""
        kind, _, count = (resources.gpus or "0").rpartition(":")
        here = self.gpus.get(kind, 0) if kind else sum(self.gpus.values())
        asked = {
            "cpus": resources.cpus > self.cpus,
            "mem": megabytes(resources.mem) > self.memory_mb,
            "gpus": int(count) > here,
        }
        return [name for name, more in asked.items() if more]


@dataclass(frozen=True)
class Partition:
    """A partition: whether it takes jobs, its longest time in seconds (None: no limit), its kinds of nodes."""

    name: str
    default: bool
    up: bool
    limit_s: int | None
    nodes: tuple[Node, ...]


def partitions(scheduler: Scheduler) -> dict[str, Partition]:
    """The cluster's partitions by name.

    Raises:
        ClusterError: if sinfo does not answer.
    """
    found: dict[str, Partition] = {}
    for line in ask(scheduler, "sinfo", "-h", "-a", "-e", "-o", "%P|%a|%l|%c|%m|%G").splitlines():
        name, state, limit, cpus, memory, gres = line.split("|")
        kinds = {kind or "": int(count) for kind, count in _GPU.findall(gres)}
        node = Node(_number(cpus), _number(memory), kinds)
        plain = name.removesuffix("*")
        known = found[plain].nodes if plain in found else ()
        limit_s = None if limit in {"infinite", "n/a"} else limit_seconds(limit)
        found[plain] = Partition(plain, name.endswith("*"), state == "up", limit_s, (*known, node))
    return found


def ask(scheduler: Scheduler, *argv: str) -> str:
    """What a command prints beside the scheduler.

    Raises:
        ClusterError: with the command's own words, if it fails.
    """
    ran = scheduler.run(*argv)
    if ran.code:
        raise ClusterError(ran.said)
    return ran.out


def misfits(resources: Resources, places: Sequence[Partition]) -> list[str]:
    """Why no node of the partitions can take a job, by setting; empty when one can.

    Args:
        resources: what the job asks for.
        places: partitions that it may go to.
    """
    seconds = limit_seconds(resources.time_limit)
    lacking = [node.lacks(resources) for place in places for node in place.nodes]
    too_long = [place for place in places if place.limit_s is not None and seconds > place.limit_s]
    problems = min(lacking, key=len, default=[])
    return [*problems, *(["time_limit"] if len(too_long) == len(places) else [])]


def largest(places: Iterable[Partition]) -> str:
    """The nodes there are, largest first, for a message."""
    nodes = {str(node): node for place in places for node in place.nodes}
    ordered = sorted(nodes.values(), key=lambda node: (sum(node.gpus.values()), node.memory_mb), reverse=True)
    return "; ".join(str(node) for node in ordered[:3]) or "none"


def _number(text: str) -> int:
    """`8`, or `8+` for eight and more."""
    return int(text.rstrip("+"))

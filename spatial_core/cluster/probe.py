"""The test job of the cluster check: a shell script that tries on a node what jobs will need, and says how it went.

It needs nothing but bash, so that it tells of what is missing. Each line it prints is `@name<tab>value`. It keeps what
it wrote until it is told that it was seen, or half a minute has passed, and removes it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spatial_core.cluster.environment import asking_script
from spatial_core.cluster.resources import Resources
from spatial_core.cluster.script import Submission
from spatial_core.config.settings import Settings

SEEN_S = 20.0  # a third of what the engine allows for the artifact of a job that has ended
_HOLD_LOOKS = 60  # half a second each
_MEMORY = "512M"
_TIME_LIMIT = "00:05:00"

_START = """\
#!/bin/bash
umask 077
say() { printf '@%s\\t%s\\n' "$1" "$(printf '%s' "$2" | tr '\\n\\t' '  ' | tail -c 600)"; }
node=${SLURMD_NODENAME:-$(hostname)}
say node "$node"
say gpus "${CUDA_VISIBLE_DEVICES:-none}"
written=()
trap '[ ${#written[@]} -eq 0 ] || rm -f "${written[@]}"' EXIT
trap 'exit 143' TERM
folder() {
  for _ in $(seq 40); do
    [ "$(cat "$2/$token-here" 2>/dev/null)" = "$token" ] && break
    sleep 0.5
  done
  if [ ! -d "$2" ]; then say "$1" "is not there"; return; fi
  if [ "$(cat "$2/$token-here" 2>&1)" != "$token" ]; then
    say "$1" "does not hold what was written on this host"
    return
  fi
  if problem=$( { printf '%s' "$token $node" >"$2/$mine"; } 2>&1 ); then
    written+=("$2/$mine")
    say "$1" ok
  else
    say "$1" "cannot be written: $problem"
  fi
}
"""
_SCRATCH = """\
if ! scratch=$(set -u; printf '%s' "@EXPRESSION@") 2>/dev/null; then
  say scratch "has a variable that is not set"
elif [ ! -d "$scratch" ]; then
  say scratch "is no folder ($scratch)"
elif problem=$( { printf x >"$scratch/$token" && rm "$scratch/$token"; } 2>&1 ); then
  say scratch "ok $scratch, $(df -Pm "$scratch" | awk 'NR == 2 { print $4 }') MiB free"
else
  say scratch "cannot be written: $problem"
fi
"""
_CODE = """\
code=0
said=$(bash -c @ASKING@ 2>&1) || code=$?
[ $code -ne 0 ] || said=$(printf '%s' "$said" | tail -n 1)
say code "$code $said"
"""
_END = """\
say end ok
for _ in $(seq @LOOKS@); do
  [ -e "$job/seen" ] && break
  sleep 0.5
done
"""


@dataclass(frozen=True)
class Probe:
    """A test job.

    Args:
        partition: it is for.
        submission: what sbatch is given.
        token: content of the files that are written on both sides, and first part of their names.
        mine: name of the file that the node writes.
        folders: setting -> folder that both sides write to.
    """

    partition: str
    submission: Submission
    token: str
    mine: str
    folders: Mapping[str, Path]

    @property
    def log(self) -> str:
        """Its output."""
        return f"{self.submission.folder}/probe.log"

    def node_file(self, name: str) -> Path:
        """What the node writes into a folder."""
        return self.folders[name] / self.mine


def answers(log: str) -> dict[str, str]:
    """Name -> value of the lines a test job printed."""
    lines = (line[1:].partition("\t") for line in log.splitlines() if line.startswith("@"))
    return {name: value.strip() for name, _, value in lines}


def make_probe(
    settings: Settings,
    python: Path | None,
    partition: str,
    resources: Resources,
    *,
    name: str,
    token: str,
    folders: Mapping[str, Path],
) -> Probe:
    """The test job for a partition.

    Args:
        settings: where and how jobs run.
        python: interpreter of jobs; None: it is not tried.
        partition: its name.
        resources: of an asset that goes there: account, quality of service, constraint and options are taken over, and
            one GPU where it asks for some, as partitions of GPUs may refuse jobs without.
        name: job name, unique.
        token: name of the files in the folders; `<token>-here` is there with the token as its content.
        folders: setting -> folder on the shared file system.
    """
    kind, colon, _ = (resources.gpus or "").rpartition(":")
    small = Resources(
        cpus=1,
        mem=_MEMORY,
        time_limit=_TIME_LIMIT,
        gpus=f"{kind}{colon}1" if resources.gpus else None,
        partition=partition,
        account=resources.account,
        qos=resources.qos,
        constraint=resources.constraint,
        extra=resources.extra,
    )
    folder = f"{settings.jobs_dir}/{name}"
    mine = f"{token}-{name}"
    names = {"token": token, "mine": mine, "job": folder}
    script = [_START, *(f"{variable}={shlex.quote(value)}\n" for variable, value in names.items())]
    script += [f"folder {label} {shlex.quote(str(path))}\n" for label, path in folders.items()]
    if settings.compute.scratch is not None:
        # Inside double quotes, where variables are expanded: the setting's pattern admits no other expansion.
        script.append(_SCRATCH.replace("@EXPRESSION@", settings.compute.scratch))
    if python is not None:
        script.append(_CODE.replace("@ASKING@", shlex.quote(asking_script(settings.compute, python))))
    script.append(_END.replace("@LOOKS@", str(_HOLD_LOOKS)))
    options = (
        f"--job-name={name}", "--comment=spatial cluster check", f"--chdir={folder}",
        f"--output={str(folder).replace('%', '%%')}/probe.log",
        "--export=ALL", *small.options(),
    )  # fmt: skip
    return Probe(partition, Submission(name, folder, options, {"job.sh": "".join(script)}, ("",)), token, mine, folders)

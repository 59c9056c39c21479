"""The configuration files of the test cluster, as text.

Numbers that only make tests fast say so; everything else is what a site would have.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
from pathlib import Path

from tests.slurm.cluster.layout import NODES, Layout, program

CLUSTER = "spatial"
CPUS = 8
MEMORY_MIB = 65536
"""Of each emulated node: more than the machine has, so that packing never depends on where the tests run."""

_V1_MEMORY = Path("/sys/fs/cgroup/memory")


def memory_cgroups_work() -> bool:
    """Whether memory cgroups (version 1) can be made here, found out by making one.

    With them a job beyond its memory ends as OUT_OF_MEMORY. Without them slurmd compares samples with the limit and
    kills the job, which Slurm 22.05 calls FAILED with signal 9.
    """
    probe = _V1_MEMORY / f"spatial_probe_{socket.gethostname()}"
    if not (_V1_MEMORY / "memory.limit_in_bytes").exists():
        return False
    try:
        probe.mkdir(exist_ok=True)
    except OSError:
        return False
    probe.rmdir()
    return True


def write_all(layout: Layout) -> None:
    """Write every file; what is already there with the same text stays untouched."""
    cgroups = memory_cgroups_work()
    _write(layout.conf, slurm_conf(layout, cgroups))
    _write(layout.etc / "cgroup.conf", cgroup_conf())
    _write(layout.etc / "gres.conf", _GRES)
    _write(layout.etc / "slurmdbd.conf", slurmdbd_conf(layout), mode=0o600)
    _write(layout.etc / "database.sql", database_sql(layout), mode=0o600)
    _write(layout.etc / "task_prolog.sh", _TASK_PROLOG.format(scratch=layout.scratch), mode=0o755)
    _write(layout.etc / "epilog.sh", _EPILOG.format(scratch=layout.scratch), mode=0o755)
    _write_keys(layout)
    _write(layout.ssh / "sshd_config", sshd_config(layout))


def slurm_conf(layout: Layout, cgroups: bool) -> str:
    """slurm.conf, the same file for the controller, both nodes and every client."""
    host = socket.gethostname().split(".")[0]
    socket_path = layout.munge / "munge.sock"
    limits = (
        "TaskPlugin=task/cgroup\nJobAcctGatherParams=NoShared"
        if cgroups
        else "TaskPlugin=task/none\nJobAcctGatherParams=NoShared,OverMemoryKill"
    )
    hardware = f"CPUs={CPUS} RealMemory={MEMORY_MIB} State=UNKNOWN"
    nodes = [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={layout.port(node)} {hardware}" for node in NODES
    ]
    return f"""# Written by tests/slurm/cluster; edits are lost.
ClusterName={CLUSTER}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={layout.port("slurmctld")}
SlurmUser={getpass.getuser()}
SlurmdUser={getpass.getuser()}
AuthType=auth/munge
# A requeued job waits as long as a credential lives: 120 s where nothing is said.
AuthInfo=socket={socket_path},cred_expire=10
CredType=cred/munge
{"CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" if _is_loopback(host) else ""}
StateSaveLocation={layout.state}
SlurmdSpoolDir={layout.root}/spool-%n
SlurmctldPidFile={layout.run}/slurmctld.own
SlurmdPidFile={layout.run}/%n.own
SlurmctldLogFile={layout.log}/slurmctld.log
SlurmdLogFile={layout.log}/%n.log
FirstJobId={layout.facts.first_job_id}
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
{limits}
TaskProlog={layout.etc}/task_prolog.sh
Epilog={layout.etc}/epilog.sh
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# Scheduling at once instead of every half minute: only for tests.
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=1,preempt_send_user_signal
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
# Both emulated nodes are this host, which has fewer cores than they promise.
SlurmdParameters=config_overrides
ReturnToService=2
# A finished job is forgotten by squeue after some seconds (300 where nothing is said): sacct alone knows it then.
MinJobAge=10
KillWait=5
SlurmdTimeout=20
SlurmctldTimeout=20
MaxArraySize=10001
MaxJobCount=20000
DefMemPerCPU=1024
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={layout.port("slurmdbd")}
AccountingStoragePass={socket_path}
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment
GresTypes=gpu
{nodes[0]}
{nodes[1]} Gres=gpu:h100:2
PartitionName=cpu Nodes=node1 Default=YES MaxTime=1-00:00:00 PriorityTier=10 PreemptMode=OFF
PartitionName=gpu Nodes=node2 MaxTime=1-00:00:00 PriorityTier=10 PreemptMode=OFF
PartitionName=both Nodes=node1,node2 MaxTime=1-00:00:00 PriorityTier=10 PreemptMode=OFF
PartitionName=scavenge Nodes=node1,node2 MaxTime=1-00:00:00 PriorityTier=1 PreemptMode=CANCEL
PartitionName=scavenge_requeue Nodes=node1,node2 MaxTime=1-00:00:00 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=node1,node2 MaxTime=1-00:00:00 PriorityTier=100 PreemptMode=OFF
"""


def _is_loopback(host: str) -> bool:
    """Whether this host's name means loopback: SLURM binds to what the name resolves to, or to every address.

    Where it means something else, nothing but munge's key keeps others out, as on every cluster.
    """
    try:
        return socket.gethostbyname(host).startswith("127.")
    except socket.gaierror:
        return False


_GRES = """# Two GPUs that are none: their device files exist, and CUDA_VISIBLE_DEVICES is set as for real ones.
AutoDetect=off
NodeName=node2 Name=gpu Type=h100 File=/dev/null
NodeName=node2 Name=gpu Type=h100 File=/dev/zero
"""

_TASK_PROLOG = """#!/bin/sh
# Node-local scratch, as sites give it: SLURM_TMPDIR, emptied by the epilog.
folder="{scratch}/$SLURMD_NODENAME/$SLURM_JOB_ID"
mkdir -p "$folder" && echo "export SLURM_TMPDIR=$folder"
"""

_EPILOG = """#!/bin/sh
rm -rf "{scratch}/$SLURMD_NODENAME/$SLURM_JOB_ID"
"""


def cgroup_conf() -> str:
    """cgroup.conf; memory is the only thing constrained. 22.05 has no way to say "no cgroups at all"."""
    swap = "yes" if (_V1_MEMORY / "memory.memsw.limit_in_bytes").exists() else "no"
    return f"""CgroupPlugin=cgroup/v1
CgroupMountpoint={_V1_MEMORY.parent}
ConstrainCores=no
ConstrainDevices=no
ConstrainRAMSpace=yes
ConstrainSwapSpace={swap}
AllowedSwapSpace=0
"""


def slurmdbd_conf(layout: Layout) -> str:
    """slurmdbd.conf."""
    return f"""AuthType=auth/munge
AuthInfo=socket={layout.munge}/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={layout.port("slurmdbd")}
SlurmUser={getpass.getuser()}
LogFile={layout.log}/slurmdbd.log
PidFile={layout.run}/slurmdbd.own
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={layout.port("mariadbd")}
StorageUser=slurm
StoragePass={layout.facts.database_password}
StorageLoc=slurm_acct_db
"""


def database_sql(layout: Layout) -> str:
    """What mariadbd runs each time it starts, before it listens."""
    secret = layout.facts.database_password
    statements = ["CREATE DATABASE IF NOT EXISTS slurm_acct_db"]
    for host in ("localhost", "127.0.0.1"):
        statements.append(f"CREATE USER IF NOT EXISTS 'slurm'@'{host}' IDENTIFIED BY '{secret}'")
        statements.append(f"GRANT ALL ON slurm_acct_db.* TO 'slurm'@'{host}'")
    return "".join(f"{statement};\n" for statement in statements)


def sshd_config(layout: Layout) -> str:
    """A daemon on loopback that lets in one key, with the defaults a login node would have."""
    ssh = layout.ssh
    return f"""Port {layout.port("sshd")}
ListenAddress 127.0.0.1
HostKey {ssh}/host_ed25519
PidFile {layout.run}/sshd.own
AuthorizedKeysFile {ssh}/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
MaxSessions 10
LogLevel VERBOSE
SetEnv SLURM_CONF={layout.conf}
Subsystem sftp internal-sftp
"""


def _write_keys(layout: Layout) -> None:
    munge_key = layout.munge / "munge.key"
    if not munge_key.exists():
        munge_key.touch(mode=0o600)
        munge_key.write_bytes(os.urandom(128))
        munge_key.chmod(0o400)
    ssh = layout.ssh
    for name in ("host_ed25519", "id_ed25519"):
        if not (ssh / name).exists():
            argv = [program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(ssh / name)]
            subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
    shutil.copy(ssh / "id_ed25519.pub", ssh / "authorized_keys")
    kind, key = (ssh / "host_ed25519.pub").read_text().split()[:2]
    _write(ssh / "known_hosts", f"[127.0.0.1]:{layout.port('sshd')} {kind} {key}\n")


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    if not path.exists() or path.read_text() != text:
        path.touch(mode=mode)
        path.write_text(text)
    path.chmod(mode)

"""Every error a stage raises on purpose.

An error names the file, the place in it, what was expected and what was found, in one line, because that line is what
the command line, the Dagster run and the SLURM log show. Anything else that escapes a stage is a bug.
"""

from __future__ import annotations


class SpatialError(Exception):
    """Base of all expected failures; its message is one line a user can act on."""


class ConfigError(SpatialError):
    """A settings file, environment variable or override is wrong."""


class InputError(SpatialError):
    """An input file or folder is missing, unreadable, or not what the stage expects."""


class TarError(InputError):
    """A tar archive is structurally damaged. The message names the tar, the byte offset and the cause."""


class ArtifactError(SpatialError):
    """An artifact is damaged or does not fit its contract. The message names what to rebuild."""


class DigestMismatch(ArtifactError):
    """Bytes differ from the digest recorded when they were made."""


class ArtifactBusy(SpatialError):
    """Another process is writing the same artifact."""


class AccountingError(SpatialError):
    """Rows were lost: rows in differ from rows kept plus rows rejected."""


class ModelError(SpatialError):
    """A model cannot be loaded, or does not fit the data it is applied to."""


class StageFailed(SpatialError):
    """A stage that ran in another process ended without its artifact."""


class ClusterError(SpatialError):
    """The cluster refused a request, or is not set up as the settings say. The message says what to do."""


class ClusterUnreachable(ClusterError):
    """No connection to the cluster, or it was lost before an answer came."""


class JobFailed(StageFailed):
    """A cluster job ended without its artifact.

    The message names job, node, exit code, time, memory and the last lines of its log.
    """


class JobOutOfMemory(JobFailed):
    """The job used more memory than it had asked for."""


class JobTimedOut(JobFailed):
    """The job reached its time limit, or could not end before its deadline."""


class JobPreempted(JobFailed):
    """The job had to make room for one of higher priority and was not put back into the queue."""


class JobCancelled(JobFailed):
    """Somebody cancelled the job."""


class NodeFailed(JobFailed):
    """The node the job ran on was lost."""


class JobVanished(JobFailed):
    """Neither the queue nor the accounting knows the job any more."""


class Interrupted(SpatialError):
    """A stage was asked to stop and did so between two pieces; running it again goes on from there."""


class StorageFull(SpatialError):
    """There is no space left in a folder that an artifact is written in."""


class RankLost(SpatialError):
    """Another process of a training run over several processes is gone, so that this one cannot go on."""

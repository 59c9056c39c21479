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

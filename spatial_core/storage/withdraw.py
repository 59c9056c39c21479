"""Taking a finished artifact out of the lake again, when a check finds that it would poison what is made from it."""

from __future__ import annotations

import shutil
from pathlib import Path

from spatial_core.errors import ArtifactError
from spatial_core.storage.atomic import exclusive
from spatial_core.storage.provenance import manifest_path

_FOLDER = "_withdrawn"


def withdraw(artifact: Path, cause: str) -> ArtifactError:
    """Move an artifact to `_withdrawn/` beside it, where no reader of the lake looks, and forget its manifest.

    The bytes are kept for a look at what went wrong; an older withdrawn artifact of the same name makes way. The
    manifest goes first: killed in between, the artifact counts as unfinished and is simply made again.

    Returns:
        The error to raise, saying why and where the artifact lies now.
    """
    place = artifact.parent / _FOLDER / artifact.name
    with exclusive(artifact):
        manifest_path(artifact).unlink(missing_ok=True)
        if place.is_dir():
            shutil.rmtree(place)
        place.parent.mkdir(exist_ok=True)
        artifact.replace(place)
    return ArtifactError(f"{artifact.name}: {cause}; withdrawn to {place}")

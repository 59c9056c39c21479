"""What may be replaced as a whole: a folder that holds nothing but what the stage that replaces it once wrote there.

A name alone proves nothing, for anybody may have a README.md or a train.parquet. Either the manifest beside the folder
lists the file, or what lies in the folder shows where it came from: the first survives damaged files, the second a
folder that was moved, and a run that was killed before it wrote its manifest.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from spatial_core.errors import InputError
from spatial_core.storage.provenance import read_manifest


def require_replaceable(folder: Path, stage: str, proven: Collection[str]) -> None:
    """Refuse a folder with files of others. Files whose name starts with a dot do not count; hidden folders do.

    Args:
        folder: what is about to be replaced; need not exist.
        stage: that replaces it; its manifest beside the folder counts.
        proven: names, relative to the folder, of files that show themselves to be the stage's.

    Raises:
        InputError: if it is a file, or holds a file that the stage did not write; names the first in order.
        ArtifactError: if the manifest beside it cannot be read.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, and would be replaced by a folder; name another folder")
    own = {*proven, *_recorded(folder, stage)}
    foreign = next((name for name in _files(folder) if name not in own), None)
    if foreign is not None:
        raise InputError(
            f"{folder}: holds {foreign} and would be replaced as a whole; name a folder that is empty, new, or holds "
            f"an earlier output of stage '{stage}' only"
        )


def _recorded(folder: Path, stage: str) -> set[str]:
    record = read_manifest(folder)
    if record is None or record["provenance"]["stage"] != stage:
        return set()
    return {str(name) for name, _, _ in record["stat"]}


def _files(folder: Path) -> Iterator[str]:
    """Names of files, links and empty folders, one after another: a whole disk may have been named by mistake."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        links = (name for name in folders if Path(parent, name).is_symlink())
        for name in sorted((*(name for name in names if not name.startswith(".")), *links)):
            yield Path(parent, name).relative_to(folder).as_posix()
        if not folders and not names and parent != str(folder):
            yield Path(parent).relative_to(folder).as_posix()

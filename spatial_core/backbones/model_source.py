"""Where a backbone's files are, and which revision of it they are: settled before anything is loaded.

Three kinds of name: `seeded:<name>` is built here, a folder is identified by the digest of its files, and anything else
is a hub id, whose branch or tag is resolved to the commit that is then recorded. Hub files lie in the Hugging Face
cache (`HF_HOME`); without a network a commit that is in the cache is used.
"""

from __future__ import annotations

import functools
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from spatial_core.backbones.seeded import PREFIX, seeded_folder
from spatial_core.errors import ConfigError, ModelError
from spatial_core.storage.digests import digest_json, sha256_file

_log = logging.getLogger(__name__)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
# Weights are read from safetensors only: the older pickle files can run code.
_WANTED = ["*.json", "*.safetensors", "LICENSE*"]
_IDENTITY = ("config.json", "preprocessor_config.json", "processor_config.json", "*.safetensors*", "*.py")


@dataclass(frozen=True)
class ModelSource:
    """A model folder on this machine and what it holds.

    Args:
        folder: where the files are.
        model_id: hub id, `seeded:<name>`, or a local folder's name: never a path of this machine.
        revision: the hub commit, or the first 16 hex digits of a digest over the folder's files.
    """

    folder: Path
    model_id: str
    revision: str


def find_model(
    model_name: str,
    revision: str | None = None,
    *,
    cache_dir: Path,
    base_dir: Path | None = None,
    trust_remote_code: bool = False,
) -> ModelSource:
    """Settle what `model_name` means.

    Args:
        model_name: hub id, folder, or `seeded:<name>`.
        revision: commit, tag or branch of a hub model; for folders, the digest they must have.
        cache_dir: where built-in models are written.
        base_dir: what a relative folder is relative to; default the working folder.
        trust_remote_code: code of the model repository is going to run.

    Raises:
        ConfigError: if code of a hub repository would run at a revision that is not a commit.
        ModelError: if there is no such model, it cannot be fetched, or a folder is not the revision asked for.
    """
    if model_name.startswith(PREFIX):
        return _local(seeded_folder(model_name, cache_dir), model_name, revision)
    folder = (base_dir or Path.cwd()) / Path(model_name).expanduser()
    if folder.is_dir():
        return _local(folder.resolve(), folder.resolve().name, revision)
    if not _HUB_ID.fullmatch(model_name):
        raise ModelError(f"{model_name}: no such folder, and not a hub id (organisation/model)")
    if trust_remote_code and not _COMMIT.fullmatch(revision or ""):
        raise ConfigError(
            f"{model_name}: trust_remote_code runs code from the hub and needs a commit to run it from; "
            f"set embedding_model.revision to its 40 hex digits (found {revision or 'none'})"
        )
    return _from_hub(model_name, revision, trust_remote_code)


def _local(folder: Path, model_id: str, expected: str | None) -> ModelSource:
    found = _folder_digest(folder, _fingerprint(folder))
    if expected is not None and expected != found:
        raise ModelError(f"{folder}: its files have revision {found}, settings ask for {expected}")
    return ModelSource(folder, model_id, found)


def _identifying_files(folder: Path) -> list[Path]:
    return sorted({file for pattern in _IDENTITY for file in folder.glob(pattern) if file.is_file()})


def _fingerprint(folder: Path) -> tuple[tuple[str, int, int], ...]:
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in _identifying_files(folder))


@functools.lru_cache(maxsize=16)
def _folder_digest(folder: Path, _unchanged: tuple[tuple[str, int, int], ...]) -> str:
    """Digest over names and contents; cached, because the largest models have 27 GB."""
    return digest_json([[file.name, sha256_file(file)] for file in _identifying_files(folder)])[:16]


def _from_hub(model_id: str, revision: str | None, trust_remote_code: bool) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    # The client lets errors of its HTTP library through. Which library that is differs by version, but its base error
    # is always a base of the client's own.
    failures: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, OSError, ValueError)
    patterns = [*_WANTED, "*.py"] if trust_remote_code else _WANTED
    wanted = f"{model_id}@{revision or 'main'}"
    try:
        folder = Path(snapshot_download(model_id, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ModelError(
            f"{wanted}: access to this model must be granted first: accept its terms at https://huggingface.co/"
            f"{model_id} and log in (`hf auth login`, or HF_TOKEN)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{wanted}: the hub cannot be reached or fails, and the model is not in the local cache; "
            f"fetch it where there is a network (`hf download {model_id}`), or name a local folder"
        ) from error
    except failures as error:
        raise ModelError(f"{wanted}: cannot be fetched from the hub ({_first_line(error)})") from error
    commit = folder.name
    if not _COMMIT.fullmatch(commit):
        raise ModelError(f"{wanted}: the hub cache holds no commit for it ({folder})")
    if revision is None:
        _log.warning(
            "%s has no pinned revision: using commit %s, which is recorded. Pin it with embedding_model.revision",
            model_id,
            commit,
        )
    return ModelSource(folder, model_id, commit)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

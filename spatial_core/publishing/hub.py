"""Uploading a published model folder to a Hugging Face hub.

One commit holds all files, so a reader of the hub sees the old model or the new one, never a mix. The token comes from
the environment (`HF_TOKEN`) or the login cache of huggingface_hub, is handed only to its client, and is in no setting,
message or artifact.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of whichever HTTP library it uses
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
)

from spatial_core.errors import ConfigError, SpatialError
from spatial_core.publishing.integrity import MANIFEST, read_file_digests
from spatial_core.report import Progress, silent

# Seconds before each new attempt; a hub that answers 5xx is usually back within half a minute.
RETRY_WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
_RETRY_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_KEPT_REMOTELY = frozenset({".gitattributes"})

Result = TypeVar("Result")


class HubError(SpatialError):
    """The hub refused, or could not be reached. The message names the repository, the step and the cause."""


@dataclass(frozen=True)
class Pushed:
    """Outcome of `push_model`.

    Args:
        repo_id: `owner/name`.
        commit: commit of the repository that holds the folder's files.
        url: where a person can look at it.
        uploaded: False when the repository already held exactly these files.
    """

    repo_id: str
    commit: str
    url: str
    uploaded: bool


def push_model(
    folder: Path,
    repo_id: str,
    *,
    private: bool = True,
    endpoint: str | None = None,
    waits_s: tuple[float, ...] = RETRY_WAITS_S,
    progress: Progress = silent,
) -> Pushed:
    """Make the repository's files those of `folder`, in one commit; does nothing when they are already.

    Args:
        folder: a folder made by `publish_model`; its MANIFEST.json decides what is uploaded.
        repo_id: `owner/name`; created when absent.
        private: visibility of a repository created here; an existing one keeps its own.
        endpoint: hub to talk to; default: that of huggingface_hub (`HF_ENDPOINT`).
        waits_s: seconds before each retry of a step the hub answered with 5xx, 429, or not at all.
        progress: told about the steps.

    Raises:
        ConfigError: if there is no token, or `repo_id` is malformed.
        HubError: if the hub refuses the token or the request, or stays unreachable.
    """
    token = get_token()
    if not token:
        raise ConfigError(
            f"publishing.repo_id is {repo_id}, but there is no token: set HF_TOKEN or run `hf auth login`"
        )
    client = _Client(HfApi(endpoint=endpoint, token=token, library_name="spatial-embeddings"), repo_id, token, waits_s)
    progress(0, 3, f"hub: {repo_id}")
    try:
        url = client.call("create", lambda: client.api.create_repo(repo_id, private=private, exist_ok=True))
    except HFValidationError as error:
        raise ConfigError(f"publishing.repo_id {repo_id!r}: {client.redact(str(error))}") from None
    manifest = (folder / MANIFEST).read_bytes()
    if client.remote_file(MANIFEST) == manifest:
        commit = client.call("look up", lambda: client.api.model_info(repo_id)).sha
        return Pushed(repo_id, str(commit), str(url), uploaded=False)
    names = [*read_file_digests(folder), MANIFEST]
    remote = client.call("list files", lambda: client.api.list_repo_files(repo_id))
    stale = sorted(set(remote) - set(names) - _KEPT_REMOTELY)
    progress(1, 3, f"hub: uploading {len(names)} files")

    def commit_all() -> str:
        # The operations remember what was uploaded, so each attempt gets fresh ones.
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, folder / name) for name in names
        ]
        operations += [CommitOperationDelete(name) for name in stale]
        return client.api.create_commit(repo_id, operations, commit_message="Publish model").oid

    commit = client.call("commit", commit_all)
    progress(3, 3, f"hub: {url} at {commit}")
    return Pushed(repo_id, commit, str(url), uploaded=True)


class _Client:
    """Calls with retries, and with the token kept out of every message."""

    def __init__(self, api: HfApi, repo_id: str, token: str, waits_s: tuple[float, ...]) -> None:
        self.api = api
        self._repo_id = repo_id
        self._token = token
        self._waits_s = waits_s

    def call(self, step: str, action: Callable[[], Result]) -> Result:
        for wait_s in (*self._waits_s, None):
            try:
                return action()
            except EntryNotFoundError:
                raise
            except (HTTPError, OSError) as error:
                status = _status(error)
                final = status is not None and status not in _RETRY_STATUS
                if final or wait_s is None:
                    tries = 1 if final else len(self._waits_s) + 1
                    raise HubError(self._explain(step, status, error, tries)) from None
                time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    def remote_file(self, name: str) -> bytes | None:
        """Content of a file of the repository's main branch, or None when it has none of that name."""

        def fetch() -> bytes:
            with TemporaryDirectory() as scratch:
                return Path(self.api.hf_hub_download(self._repo_id, name, local_dir=scratch)).read_bytes()

        try:
            return self.call(f"read {name}", fetch)
        except EntryNotFoundError:
            return None

    def redact(self, text: str) -> str:
        return text.replace(self._token, "<token>")

    def _explain(self, step: str, status: int | None, error: Exception, tries: int) -> str:
        cause = self.redact(" ".join(str(error).split()))[:300]
        if status in {401, 403}:
            return f"hub {self._repo_id}: {step} refused ({status}): the token is not valid or may not write there"
        if status == 404:
            return f"hub {self._repo_id}: {step}: no such repository, or the token may not see it"
        return f"hub {self._repo_id}: {step} failed, tries: {tries} ({status or type(error).__name__}: {cause})"


def _status(error: Exception) -> int | None:
    """HTTP status of an answer, or None when there was no answer."""
    response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError | HTTPError) else None
    return None if response is None else int(response.status_code)

"""Pushing to a hub: the real client against a local server that can refuse, fail and forget."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spatial_core.errors import ConfigError
from spatial_core.publishing import hub as hub_module
from spatial_core.publishing.hub import HubError, push_model
from spatial_core.publishing.integrity import write_file_digests
from tests.data.local_hub import LFS_ABOVE_BYTES, TOKEN, LocalHub, local_hub

REPO = "tester/facades"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with local_hub() as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    (made / "golden").mkdir(parents=True)
    (made / "config.json").write_text('{"model_type": "spatial_embeddings"}\n')
    (made / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (made / "model.safetensors").write_bytes(bytes(range(256)) * (LFS_ABOVE_BYTES // 128))
    (made / "golden" / "00.jpg").write_bytes(b"\xff\xd8\xff picture")
    write_file_digests(made)
    return made


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_attributes(hub: LocalHub) -> dict[str, bytes]:
    return {name: data for name, data in hub.repositories[REPO].files.items() if name != ".gitattributes"}


def test_first_push_creates_a_private_repository_with_exactly_the_files(hub: LocalHub, folder: Path) -> None:
    pushed = push_model(folder, REPO, endpoint=hub.url)
    assert pushed.uploaded
    assert pushed.commit == hub.repositories[REPO].commits[-1]
    assert hub.repositories[REPO].private
    assert without_attributes(hub) == files_of(folder)


def test_second_push_of_the_same_files_uploads_nothing(hub: LocalHub, folder: Path) -> None:
    first = push_model(folder, REPO, endpoint=hub.url)
    before = len(hub.requests)
    second = push_model(folder, REPO, endpoint=hub.url)
    assert not second.uploaded
    assert second.commit == first.commit
    assert not [line for line in hub.requests[before:] if line.startswith("PUT") or "/commit/" in line]


def test_changed_files_replace_old_ones_and_vanished_ones_go(hub: LocalHub, folder: Path) -> None:
    push_model(folder, REPO, endpoint=hub.url)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Another\n")
    (folder / "golden" / "00.jpg").unlink()
    write_file_digests(folder)
    pushed = push_model(folder, REPO, endpoint=hub.url)
    assert pushed.uploaded
    assert without_attributes(hub) == files_of(folder)


def test_bad_token_is_refused_at_once_and_not_shown(
    hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_wrongtoken9876543210"  # noqa: S105 - opens nothing
    monkeypatch.setenv("HF_TOKEN", secret)
    with pytest.raises(HubError, match=r"create refused \(401\).*token") as caught:
        push_model(folder, REPO, endpoint=hub.url)
    assert secret not in str(caught.value)
    assert caught.value.__cause__ is None
    assert [line for line in hub.requests if line.startswith("POST")] == ["POST /api/repos/create"]
    assert not hub.repositories


def test_no_token_is_a_settings_error(hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        push_model(folder, REPO, endpoint=hub.url)
    assert not hub.requests


def test_hub_failing_half_way_is_retried_until_it_answers(hub: LocalHub, folder: Path) -> None:
    hub.faults["POST .*/commit/"] = [500, 500]
    pushed = push_model(folder, REPO, endpoint=hub.url, waits_s=(0.01, 0.01, 0.01))
    assert pushed.uploaded
    assert without_attributes(hub) == files_of(folder)


def test_hub_failing_for_good_leaves_the_old_model_and_says_so(hub: LocalHub, folder: Path) -> None:
    push_model(folder, REPO, endpoint=hub.url)
    old = dict(hub.repositories[REPO].files)
    (folder / "config.json").write_text("{}\n")
    write_file_digests(folder)
    hub.faults["POST .*/commit/"] = [500] * 50
    with pytest.raises(HubError, match=r"commit failed, tries: 3 \(500") as caught:
        push_model(folder, REPO, endpoint=hub.url, waits_s=(0.01, 0.01))
    assert TOKEN not in str(caught.value)
    assert hub.repositories[REPO].files == old


def test_unreachable_hub_is_a_hub_error(hub: LocalHub, folder: Path) -> None:
    with pytest.raises(HubError, match="create failed, tries: 2"):
        push_model(folder, REPO, endpoint="http://127.0.0.1:9", waits_s=(0.01,))


def test_malformed_repository_name_is_a_settings_error(hub: LocalHub, folder: Path) -> None:
    with pytest.raises(ConfigError, match="repo_id"):
        push_model(folder, "not a/repo/name", endpoint=hub.url)

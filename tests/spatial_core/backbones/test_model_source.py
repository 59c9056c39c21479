"""Which files a model name stands for, and which revision of them: built-in, folder and hub."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from spatial_core.backbones.family import known_families
from spatial_core.backbones.loading import load_source
from spatial_core.backbones.model_source import find_model
from spatial_core.backbones.seeded import PREFIX, build, seeded_folder, seeded_names
from spatial_core.errors import ConfigError, ModelError
from tests.data.local_hub import TOKEN, LocalHub, Repository, local_hub
from tests.data.make_model import make_backbone

REPO = "tester/dinov2-tiny"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("model") / "tiny")


# --- built-in models ---


def test_built_in_models_are_written_once_and_bring_the_same_weights_everywhere(tmp_path: Path) -> None:
    assert set(seeded_names()) == {PREFIX + name for name in ("dinov2-demo", "dinov2-registers-demo", "dinov3-demo")}
    name = PREFIX + "dinov2-demo"
    first = find_model(name, cache_dir=tmp_path / "a")
    written = (first.folder / "model.safetensors").stat().st_mtime_ns
    assert find_model(name, cache_dir=tmp_path / "a") == first
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == written
    second = find_model(name, cache_dir=tmp_path / "b")
    assert (first.model_id, first.revision) == (second.model_id, second.revision) == (name, first.revision)


def test_building_leaves_the_random_state_alone() -> None:
    demo = known_families()[0].demos["dinov2-demo"]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    build(demo)
    assert torch.equal(torch.rand(3), expected)


def test_concurrent_first_calls_agree_and_leave_nothing_behind(tmp_path: Path) -> None:
    together = threading.Barrier(3)

    def write(_: int) -> Path:
        together.wait(10)
        return seeded_folder(PREFIX + "dinov3-demo", tmp_path)

    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(write, range(3)))
    assert len(folders) == 1
    assert list(tmp_path.iterdir()) == list(folders)


def test_unknown_built_in_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="seeded:resnet: no such built-in model; there are seeded:dinov2-demo"):
        find_model("seeded:resnet", cache_dir=tmp_path)


# --- folders ---


def test_a_folder_is_known_by_what_decides_its_features(backbone: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(backbone, tmp_path / "tiny")
    original = find_model(str(backbone), cache_dir=tmp_path)
    assert original.model_id == "tiny"
    assert len(original.revision) == 16
    (copy / "README.md").write_text("not part of it")
    assert find_model(str(copy), cache_dir=tmp_path).revision == original.revision
    assert find_model(str(copy), original.revision, cache_dir=tmp_path).folder == copy
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    changed = find_model(str(copy), cache_dir=tmp_path).revision
    assert changed != original.revision
    with pytest.raises(ModelError, match=f"have revision {changed}, settings ask for {original.revision}"):
        find_model(str(copy), original.revision, cache_dir=tmp_path)


def test_relative_folders_are_relative_to_the_settings(backbone: Path, tmp_path: Path) -> None:
    found = find_model("tiny", cache_dir=tmp_path, base_dir=backbone.parent)
    assert found.folder == backbone


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "a/b/c", "", "../x", "org/na me"])
def test_neither_folder_nor_hub_id(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        find_model(name, cache_dir=tmp_path, base_dir=tmp_path / "nowhere")


# --- the hub: the real client against a local server ---


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backbone: Path) -> Iterator[LocalHub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with local_hub() as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        repository = Repository(private=False)
        repository.files |= {file.name: file.read_bytes() for file in backbone.iterdir()}
        repository.files["pytorch_model.bin"] = b"a pickle"
        repository.files["modeling_tiny.py"] = b"raise SystemExit\n"
        repository.commit()
        running.repositories[REPO] = repository
        yield running


def test_an_unpinned_hub_model_is_resolved_to_its_commit_and_says_so(
    hub: LocalHub, tmp_path: Path, backbone: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit = hub.repositories[REPO].commits[-1]
    with caplog.at_level(logging.WARNING):
        found = find_model(REPO, cache_dir=tmp_path)
    assert (found.model_id, found.revision) == (REPO, commit)
    assert f"{REPO} has no pinned revision: using commit {commit}" in caplog.text
    # Neither code nor pickles are fetched.
    assert {file.name for file in found.folder.iterdir()} == {file.name for file in backbone.iterdir()}
    assert load_source(found).describe()["revision"] == commit


def test_a_pinned_hub_model_is_taken_at_its_commit_without_a_notice(
    hub: LocalHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    commit = hub.repositories[REPO].commits[-1]
    assert find_model(REPO, commit, cache_dir=tmp_path).revision == commit
    assert not caplog.text
    with pytest.raises(ModelError, match=f"{REPO}@{'0' * 40}: cannot be fetched"):
        find_model(REPO, "0" * 40, cache_dir=tmp_path)


def test_without_a_network_the_cached_commit_is_used(hub: LocalHub, tmp_path: Path) -> None:
    commit = find_model(REPO, cache_dir=tmp_path).revision
    hub.faults[".*"] = [503] * 1000
    with pytest.MonkeyPatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert find_model(REPO, cache_dir=tmp_path).revision == commit
        with pytest.raises(ModelError, match="other/model@main: the hub cannot be reached or fails, and the model is"):
            find_model("other/model", cache_dir=tmp_path)


def test_unknown_repository_and_failing_hub(hub: LocalHub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tester/missing@main: cannot be fetched from the hub") as caught:
        find_model("tester/missing", cache_dir=tmp_path)
    assert TOKEN not in str(caught.value)
    hub.faults[r"GET /api/models"] = [500] * 50
    with pytest.raises(ModelError, match=f"{REPO}@main: the hub cannot be reached or fails"):
        find_model(REPO, cache_dir=tmp_path)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "0123abc"])
def test_remote_code_runs_from_a_commit_only(revision: str | None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a commit to run it from"):
        find_model(REPO, revision, cache_dir=tmp_path, trust_remote_code=True)


def test_remote_code_is_fetched_when_asked_for_by_commit(hub: LocalHub, tmp_path: Path) -> None:
    commit = hub.repositories[REPO].commits[-1]
    found = find_model(REPO, commit, cache_dir=tmp_path, trust_remote_code=True)
    assert (found.folder / "modeling_tiny.py").is_file()

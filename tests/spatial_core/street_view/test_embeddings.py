"""The embed stage: rows, numbers, resuming after a kill, and everything that can have changed since ingest."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from spatial_core import schemas
from spatial_core.backbones.loading import Backbone, load_backbone
from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactBusy, ArtifactError, DigestMismatch, InputError, ModelError
from spatial_core.images.decode import decode_jpeg
from spatial_core.storage.atomic import exclusive
from spatial_core.storage.parquet import read_provenance, vectors_to_numpy
from spatial_core.storage.provenance import manifest_path, verify_artifact
from spatial_core.street_view.embeddings import embed_tar
from spatial_core.street_view.ingest import ingest_tar
from tests.data.make_model import make_backbone, model_settings
from tests.data.make_tars import street_view, tar_bytes

TARGETS = 12


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tar and its intermediates; tests that change either copy it first."""
    return ingest(tmp_path_factory.mktemp("ingested"))


def ingest(folder: Path, data_set: int = 101) -> tuple[Path, Path]:
    tar = folder / f"{data_set:04d}.tar"
    tar.write_bytes(tar_bytes(street_view(data_set, seed=3, targets=TARGETS, side_px=72)))
    ingest_tar(tar, folder / "intermediates", Settings())
    return tar, folder / "intermediates" / f"{data_set:04d}.parquet"


def configured(root: Path, backbone: Path, *overrides: str) -> Settings:
    """Batches of 4 in pieces of 8."""
    return model_settings(root, backbone, "embedding_model.batch_size=4", "embedding_model.piece_rows=8", *overrides)


def matrix_of(path: Path) -> npt.NDArray[np.float32]:
    return vectors_to_numpy(pq.read_table(path)["embedding"])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pieces_of(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*pieces-*/*.parquet"))


def test_rows_and_columns_of_the_intermediates_with_the_model_s_vectors(
    ingested: tuple[Path, Path], backbone: Path, tmp_path: Path
) -> None:
    tar, intermediates = ingested
    progress: list[tuple[int, int | None]] = []
    report = embed_tar(
        tar,
        intermediates,
        tmp_path / "out",
        configured(tmp_path, backbone),
        lambda done, total, _message: progress.append((done, total)),
    )
    assert report.artifact == tmp_path / "out" / "0101_embeddings.parquet"
    table = pq.read_table(report.artifact)
    given = pq.read_table(intermediates)
    assert table.schema.equals(schemas.embeddings(32, "float32"))
    assert table.select(given.column_names).equals(given)
    assert (report.rows, report.rows_in, report.kept) == (len(given),) * 3
    assert progress[-1] == (len(given), len(given))
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)

    loaded = load_backbone(str(backbone), cache_dir=tmp_path)
    data = tar.read_bytes()
    vectors = matrix_of(report.artifact)
    for row in range(len(given)):
        offset, length = given["image_offset"][row].as_py(), given["image_bytes"][row].as_py()
        pixels = loaded.preprocessing.pixels(decode_jpeg(data[offset : offset + length]))
        batch = loaded.preprocessing.normalise(torch.from_numpy(pixels.copy())[None])
        with torch.inference_mode():
            np.testing.assert_allclose(vectors[row], loaded.features(batch)[0].numpy(), atol=1e-5)


def test_the_origin_is_recorded_and_names_no_path(ingested: tuple[Path, Path], backbone: Path, tmp_path: Path) -> None:
    report = embed_tar(*ingested, tmp_path / "out", configured(tmp_path, backbone))
    verify_artifact(report.artifact)
    provenance = read_provenance(report.artifact)
    assert provenance is not None
    loaded = load_backbone(str(backbone), cache_dir=tmp_path)
    assert provenance.model == loaded.describe()
    assert provenance.model["id"] == "tiny"
    assert provenance.model["pooling_type"] == "cls_token"
    assert provenance.preprocessing == loaded.preprocessing.id
    assert set(provenance.inputs) == {"intermediates"}
    assert str(tmp_path) not in provenance.to_json()
    assert "/" not in json.dumps(dict(provenance.config))


def test_nothing_is_done_twice_until_something_that_counts_changes(
    ingested: tuple[Path, Path], backbone: Path, tmp_path: Path
) -> None:
    tar, intermediates = tmp_path / "0101.tar", tmp_path / "0101.parquet"
    shutil.copy(ingested[0], tar)
    shutil.copy(ingested[1], intermediates)
    out = tmp_path / "out"
    first = embed_tar(tar, intermediates, out, configured(tmp_path, backbone))
    assert not first.up_to_date
    tar.unlink()  # what was made of a raw tar outlives it
    same = embed_tar(
        tar,
        intermediates,
        out,
        configured(tmp_path, backbone, "embedding_model.batch_size=5", "logging.log_every_n_batches=7"),
    )
    assert same.up_to_date
    with pytest.raises(InputError, match=r"0101\.tar"):
        embed_tar(tar, intermediates, out, configured(tmp_path, backbone, "embedding_model.pooling_type=pooler_output"))
    assert first.artifact.is_file()


def test_bytes_do_not_depend_on_folder_threads_or_company(
    ingested: tuple[Path, Path], backbone: Path, tmp_path: Path
) -> None:
    digests = set()
    for place, threads in (("a", 1), ("b", 3)):
        moved = shutil.copytree(backbone, tmp_path / place / "tiny")
        settings = configured(tmp_path / place, moved, f"infrastructure.threads={threads}")
        expected_digest = settings.digest
        report = embed_tar(*ingested, tmp_path / place / "out", settings)
        digests.add(vectors_digest(report.artifact))
        provenance = read_provenance(report.artifact)
        assert provenance is not None
        assert provenance.config_digest == expected_digest
    assert len(digests) == 1


def vectors_digest(path: Path) -> str:
    return hashlib.sha256(matrix_of(path).tobytes()).hexdigest()


def test_float16_on_request(ingested: tuple[Path, Path], backbone: Path, tmp_path: Path) -> None:
    wide = embed_tar(*ingested, tmp_path / "wide", configured(tmp_path, backbone))
    narrow = embed_tar(
        *ingested, tmp_path / "narrow", configured(tmp_path, backbone, "embedding_model.vector_dtype=float16")
    )
    assert pq.read_schema(narrow.artifact).equals(schemas.embeddings(32, "float16"))
    np.testing.assert_array_equal(matrix_of(narrow.artifact), matrix_of(wide.artifact).astype(np.float16))


def scaled_backbone(source: Path, target: Path, factor: float) -> Path:
    """The same model with its last layer's scale and offset multiplied."""
    folder = shutil.copytree(source, target)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    for name in ("layernorm.weight", "layernorm.bias"):
        weights[name] = weights[name] * factor
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_vectors_that_are_no_numbers_or_too_large_are_refused(
    ingested: tuple[Path, Path], backbone: Path, tmp_path: Path
) -> None:
    large = scaled_backbone(backbone, tmp_path / "large", 1e6)
    with pytest.raises(ArtifactError, match=r"row 0: the model's vector does not fit in float16; set .*vector_dtype"):
        embed_tar(*ingested, tmp_path / "out", configured(tmp_path, large, "embedding_model.vector_dtype=float16"))
    broken = scaled_backbone(backbone, tmp_path / "broken", float("nan"))
    with pytest.raises(ArtifactError, match="row 0: the model's vector is not finite"):
        embed_tar(*ingested, tmp_path / "out", configured(tmp_path, broken))
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_intermediates_of_another_tar_are_refused(ingested: tuple[Path, Path], backbone: Path, tmp_path: Path) -> None:
    other_tar, _ = ingest(tmp_path, data_set=102)
    with pytest.raises(InputError, match=r"0101\.parquet: expected 0102\.parquet, which ingest makes of 0102\.tar"):
        embed_tar(other_tar, ingested[1], tmp_path / "out", configured(tmp_path, backbone))
    assert not (tmp_path / "out").exists()
    renamed = tmp_path / "0102.parquet"
    shutil.copy(ingested[1], renamed)
    with pytest.raises(InputError, match=r"row 0 belongs to 0101\.tar, not to 0102\.tar"):
        embed_tar(other_tar, renamed, tmp_path / "out", configured(tmp_path, backbone))
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_intermediates_of_the_earlier_pipeline_are_refused(
    ingested: tuple[Path, Path], backbone: Path, tmp_path: Path
) -> None:
    tar, intermediates = ingested
    old = tmp_path / "0101.parquet"
    pq.write_table(pq.read_table(intermediates).select(pq.read_schema(intermediates).names[:10]), old)
    with pytest.raises(ArtifactError, match="no column image_offset"):
        embed_tar(tar, old, tmp_path / "out", configured(tmp_path, backbone))


def test_intermediates_without_rows_or_with_nulls_are_refused(
    ingested: tuple[Path, Path], backbone: Path, tmp_path: Path
) -> None:
    tar, intermediates = ingested
    table = pq.read_table(intermediates)
    altered = tmp_path / "0101.parquet"
    pq.write_table(table.slice(0, 0), altered)
    with pytest.raises(InputError, match="no rows"):
        embed_tar(tar, altered, tmp_path / "out", configured(tmp_path, backbone))
    place = table.schema.get_field_index("image_offset")
    offsets = pa.array([None, *table["image_offset"].to_pylist()[1:]], pa.int64())
    pq.write_table(table.set_column(place, "image_offset", offsets), altered)
    with pytest.raises(ArtifactError, match="1 null values in image_offset"):
        embed_tar(tar, altered, tmp_path / "out", configured(tmp_path, backbone))


def test_a_flipped_bit_in_the_tar_is_noticed_and_earlier_pieces_survive_it(
    ingested: tuple[Path, Path], backbone: Path, tmp_path: Path
) -> None:
    tar, intermediates = tmp_path / "0101.tar", ingested[1]
    rows = pq.read_table(intermediates)
    at = rows["image_offset"][18].as_py() + rows["image_bytes"][18].as_py() // 2
    data = bytearray(ingested[0].read_bytes())
    data[at] ^= 4
    tar.write_bytes(data)
    with pytest.raises(DigestMismatch, match=r"0101\.tar: byte"):
        embed_tar(tar, intermediates, tmp_path / "out", configured(tmp_path, backbone))
    assert not list((tmp_path / "out").glob("*.parquet"))
    assert len(pieces_of(tmp_path / "out")) == 2
    report = embed_tar(ingested[0], intermediates, tmp_path / "out", configured(tmp_path, backbone))
    assert report.details["pieces_resumed"] == 2


def test_an_image_that_ingest_would_not_have_accepted_ends_the_stage(
    ingested: tuple[Path, Path], backbone: Path, tmp_path: Path
) -> None:
    tar, intermediates = tmp_path / "0101.tar", tmp_path / "0101.parquet"
    table = pq.read_table(ingested[1])
    offset, length = (table[name][5].as_py() for name in ("image_offset", "image_bytes"))
    data = bytearray(ingested[0].read_bytes())
    data[offset : offset + 2] = b"XX"
    tar.write_bytes(data)
    digests = table["image_sha256"].to_pylist()
    digests[5] = hashlib.sha256(data[offset : offset + length]).hexdigest()
    place = table.schema.get_field_index("image_sha256")
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(digests)), intermediates)
    with pytest.raises(InputError, match=rf"0101\.tar: byte {offset}: .*not a JPEG.*ingest this tar again"):
        embed_tar(tar, intermediates, tmp_path / "out", configured(tmp_path, backbone))


# --- resuming ---

KILLED = """
import os, signal, sys
from pathlib import Path
from spatial_core.config.settings import Settings
from spatial_core.street_view.embeddings import embed_tar

def progress(done, total, message):
    if done >= {after}:
        os.kill(os.getpid(), signal.SIGKILL)

embed_tar(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), Settings.from_json(sys.argv[4]), progress)
"""


def run_killed(tar: Path, intermediates: Path, out: Path, settings: Settings, after: int) -> None:
    arguments = [str(tar), str(intermediates), str(out), settings.to_json()]
    killed = subprocess.run([sys.executable, "-c", KILLED.format(after=after), *arguments], check=False)
    assert killed.returncode == -signal.SIGKILL


class Interrupted(Exception):
    pass


def run_interrupted(tar: Path, intermediates: Path, out: Path, settings: Settings, after: int) -> None:
    """As `run_killed`, without another process."""

    def progress(done: int, _total: int | None, _message: str) -> None:
        if done >= after:
            raise Interrupted

    with pytest.raises(Interrupted):
        embed_tar(tar, intermediates, out, settings, progress)


def test_a_killed_run_goes_on_from_its_finished_pieces_to_the_same_bytes(
    ingested: tuple[Path, Path], backbone: Path, tmp_path: Path
) -> None:
    settings = configured(tmp_path, backbone)
    whole = embed_tar(*ingested, tmp_path / "whole", settings)
    out = tmp_path / "out"
    run_killed(*ingested, out, settings, after=20)
    assert not list(out.glob("*.parquet"))
    assert not manifest_path(out / whole.artifact.name).exists()
    assert len(pieces_of(out)) == 2
    started: list[int] = []
    report = embed_tar(*ingested, out, settings, lambda done, _total, _message: started.append(done))
    assert started[0] == 20  # 16 rows of finished pieces, and the first batch
    assert report.details["pieces_resumed"] == 2
    assert report.details["pieces"] == whole.details["pieces"]
    assert digest(report.artifact) == digest(whole.artifact)
    assert not list(out.glob(".*pieces*"))


def test_pieces_hold_whole_batches(ingested: tuple[Path, Path], backbone: Path, tmp_path: Path) -> None:
    """Resuming must not regroup images, so pieces are rounded up: 5 rows in batches of 4 make pieces of 8."""
    settings = configured(tmp_path, backbone, "embedding_model.piece_rows=5")
    run_interrupted(*ingested, tmp_path / "out", settings, after=20)
    assert [pq.read_metadata(piece).num_rows for piece in pieces_of(tmp_path / "out")] == [8, 8]


def test_damaged_pieces_are_made_again_and_foreign_ones_swept(
    ingested: tuple[Path, Path], backbone: Path, tmp_path: Path
) -> None:
    settings = configured(tmp_path, backbone)
    whole = embed_tar(*ingested, tmp_path / "whole", settings)
    out = tmp_path / "out"
    run_interrupted(*ingested, out, settings, after=28)
    first, second, third = pieces_of(out)
    data = bytearray(first.read_bytes())
    data[len(data) // 3] ^= 16
    first.write_bytes(data)
    third.write_bytes(third.read_bytes()[:100])
    foreign = out / f".{whole.artifact.stem}.pieces-{'0' * 16}"
    foreign.mkdir()
    (foreign / "000000.parquet").write_bytes(second.read_bytes())
    neighbour = out / ".0102_embeddings.pieces-0123456789abcdef"
    neighbour.mkdir()
    report = embed_tar(*ingested, out, settings)
    assert report.details["pieces_resumed"] == 1
    assert digest(report.artifact) == digest(whole.artifact)
    assert sorted(out.glob(".*pieces*")) == [neighbour]


def test_pieces_of_other_settings_are_not_used(ingested: tuple[Path, Path], backbone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_interrupted(*ingested, out, configured(tmp_path, backbone), after=20)
    changed = configured(tmp_path, backbone, "embedding_model.pooling_type=pooler_output")
    assert embed_tar(*ingested, out, changed).details["pieces_resumed"] == 0


def test_out_of_memory_halves_the_batch_and_the_vectors_agree(
    ingested: tuple[Path, Path], backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = configured(tmp_path, backbone)
    whole = embed_tar(*ingested, tmp_path / "whole", settings)
    assert whole.details["batch_size_used"] == 4
    features = Backbone.features

    def short_of_memory(self: Backbone, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return features(self, pixels)

    monkeypatch.setattr(Backbone, "features", short_of_memory)
    report = embed_tar(*ingested, tmp_path / "out", settings)
    assert report.details["batch_size_used"] == 2
    np.testing.assert_allclose(matrix_of(report.artifact), matrix_of(whole.artifact), atol=1e-5)


def test_two_writers_of_one_partition(ingested: tuple[Path, Path], backbone: Path, tmp_path: Path) -> None:
    with exclusive(tmp_path / "out" / "0101_embeddings.parquet"), pytest.raises(ArtifactBusy):
        embed_tar(*ingested, tmp_path / "out", configured(tmp_path, backbone))


def test_a_model_that_cannot_be_had_is_said_before_anything_is_written(
    ingested: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        embed_tar(*ingested, tmp_path / "out", configured(tmp_path, tmp_path / "missing"))
    assert not (tmp_path / "out").exists()

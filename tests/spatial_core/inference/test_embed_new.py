"""New images to vectors: every row accounted for, whatever is wrong with it, and whatever interrupts the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from spatial_core import interruption
from spatial_core.config.settings import Settings
from spatial_core.errors import ConfigError, InputError, Interrupted, ModelError
from spatial_core.images.decode import decode_jpeg
from spatial_core.inference.embed_new import embed_parquet
from spatial_core.inference.pooling import pool_buildings
from spatial_core.publishing.loading import load_published
from spatial_core.publishing.model_folder import publish_model
from spatial_core.storage.parquet import vectors_to_numpy
from spatial_core.storage.provenance import manifest_path, verify_artifact
from tests.data.make_model import jpegs, make_checkpoint, write_drop
from tests.spatial_core.inference.test_pooling import IDS, ids_array

Build = Callable[..., Settings]


def parts_of(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / "parts").glob("*.parquet"))}


def table_of(root: Path) -> pa.Table:
    tables = [pq.read_table(path).replace_schema_metadata() for path in sorted((root / "parts").glob("*.parquet"))]
    return pa.concat_tables(tables)


def rejects_of(root: Path) -> list[tuple[int, str]]:
    table = pq.read_table(root / "rejects.parquet")
    return list(zip(table["row"].to_pylist(), table["reason"].to_pylist(), strict=True))


def state_of(root: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((root / "state.json").read_text())
    return record


@torch.inference_mode()
def one_by_one(images: list[bytes], settings: Settings) -> npt.NDArray[Any]:
    """The plain way: every image alone through preprocessing and model."""
    model = load_published(str(settings.locations.model_dir), settings)
    vectors = []
    for data in images:
        pixels = torch.from_numpy(model.preprocessing.pixels(decode_jpeg(data)).copy())[None]
        vectors.append(model.embed(model.preprocessing.normalise(pixels)).numpy()[0])
    return np.stack(vectors)


def test_vectors_are_those_of_a_plain_loop_in_row_order(tmp_path: Path, settings: Build) -> None:
    images = jpegs(47)
    drop = write_drop(tmp_path / "d.parquet", images, [f"way/{n // 2}" for n in range(47)], row_group_size=23)
    report = embed_parquet(drop, tmp_path / "out" / "d", settings())

    table = table_of(tmp_path / "out" / "d")
    assert table.schema.field("embedding").type == pa.list_(pa.field("item", pa.float32(), nullable=False), 256)
    assert table["OSMID"].to_pylist() == [f"way/{n // 2}" for n in range(47)]
    vectors = vectors_to_numpy(table["embedding"])
    np.testing.assert_allclose(vectors, one_by_one(images, settings()), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert list(parts_of(tmp_path / "out" / "d")) == [
        *(f"rg00000_rb0000{batch}.parquet" for batch in range(3)),
        *(f"rg00001_rb0000{batch}.parquet" for batch in range(3)),
        "rg00002_rb00000.parquet",
    ]
    assert (report.rows, report.rows_in, report.kept, dict(report.rejected)) == (47, 47, 47, {})
    verify_artifact(tmp_path / "out" / "d")


def test_state_holds_what_the_layout_promises(tmp_path: Path, settings: Build, model_folder: Path) -> None:
    drop = write_drop(tmp_path / "d.parquet", jpegs(12), list(range(12)))
    embed_parquet(drop, tmp_path / "d", settings())
    state = state_of(tmp_path / "d")
    expected = {
        "input_path": str(drop),
        "output_dataset_dir": str(tmp_path / "d"),
        "model_id": str(model_folder),
        "device": "cpu",
        "batch_size": 4,
        "read_batch_size": 10,
        "filter_valid": True,
        "total_rows_in_input": 12,
        "num_row_groups": 1,
        "embeddings_written": 12,
        "last_written_part": "rg00000_rb00001.parquet",
    }
    assert {key: state[key] for key in expected} == expected


@pytest.mark.parametrize("kind", [*IDS, "null"])
def test_identifiers_of_every_type_come_through_unchanged(kind: str, tmp_path: Path, settings: Build) -> None:
    arrow_type, values = IDS.get(kind, (pa.null(), [None] * 4))
    ids = ids_array(values, arrow_type)
    drop = write_drop(tmp_path / "d.parquet", jpegs(4), ids)
    embed_parquet(drop, tmp_path / "d", settings())
    table = table_of(tmp_path / "d")
    assert table.schema.field("OSMID").type == arrow_type
    assert table["OSMID"].to_pylist() == ids.to_pylist()


def test_null_identifiers_are_carried_through_and_counted(tmp_path: Path, settings: Build) -> None:
    drop = write_drop(tmp_path / "d.parquet", jpegs(3), pa.array([7, None, 9], pa.int64()))
    report = embed_parquet(drop, tmp_path / "d", settings())
    assert table_of(tmp_path / "d")["OSMID"].to_pylist() == [7, None, 9]
    assert report.details["null_ids"] == 1


def test_bad_rows_are_listed_alone_and_the_rest_embedded(tmp_path: Path, settings: Build) -> None:
    images: list[bytes | None] = [*jpegs(25)]
    good = [*images]
    images[3] = None
    images[4] = b""
    images[5] = b"\x89PNG\r\n\x1a\n not a jpeg"
    images[6] = (images[6] or b"")[:-40]
    valid: list[bool | None] = [True] * 25
    valid[10], valid[11] = False, None
    drop = write_drop(tmp_path / "d.parquet", images, list(range(100, 125)), valid=valid, row_group_size=13)
    report = embed_parquet(drop, tmp_path / "d", settings())

    assert rejects_of(tmp_path / "d") == [
        (3, "image_null"),
        (4, "image_empty"),
        (5, "image_not_jpeg"),
        (6, "image_corrupt"),
        (10, "is_valid_false"),
        (11, "is_valid_null"),
    ]
    rejects = pq.read_table(tmp_path / "d" / "rejects.parquet")
    assert rejects["OSMID"].to_pylist() == [103, 104, 105, 106, 110, 111]
    assert rejects["row_group"].to_pylist() == [0] * 6
    kept = [row for row in range(25) if row not in {3, 4, 5, 6, 10, 11}]
    table = table_of(tmp_path / "d")
    assert table["OSMID"].to_pylist() == [100 + row for row in kept]
    expected = one_by_one([good[row] or b"" for row in kept], settings())
    np.testing.assert_allclose(vectors_to_numpy(table["embedding"]), expected, atol=2e-6)
    assert report.rows_in == 25
    assert sum(report.rejected.values()) == 6


def test_a_drop_without_a_usable_row_fails_and_lists_them_all(tmp_path: Path, settings: Build) -> None:
    drop = write_drop(tmp_path / "d.parquet", [b"x"] * 11 + [None], [str(n) for n in range(12)])
    listed = tmp_path / "d" / "rejects.parquet"
    for _ in range(2):  # the second run finds nothing to do, and says the same
        with pytest.raises(InputError, match=rf"none of 12 rows .*image_not_jpeg 11, image_null 1.* in {listed}"):
            embed_parquet(drop, tmp_path / "d", settings())
        for part in (tmp_path / "d" / "parts").glob("*.parquet"):
            assert pq.read_schema(part).names == ["OSMID", "embedding"]
        assert len(rejects_of(tmp_path / "d")) == 12
    assert not manifest_path(tmp_path / "d").exists()
    write_drop(drop, jpegs(3), list("abc"))
    assert embed_parquet(drop, tmp_path / "d", settings()).rows == 3
    assert rejects_of(tmp_path / "d") == []


def test_a_limit_before_the_first_usable_row_fails_and_a_longer_run_goes_on(tmp_path: Path, settings: Build) -> None:
    drop = write_drop(tmp_path / "d.parquet", [b"x", b"x", *jpegs(4)], list(range(6)))
    with pytest.raises(InputError, match="none of 2 rows"):
        embed_parquet(drop, tmp_path / "d", settings("inference.limit=2"))
    assert embed_parquet(drop, tmp_path / "d", settings()).rows == 4


def test_a_replacement_without_a_usable_row_leaves_the_old_results(tmp_path: Path, settings: Build) -> None:
    drop = write_drop(tmp_path / "d.parquet", jpegs(5), list(range(5)))
    embed_parquet(drop, tmp_path / "out", settings())
    before = parts_of(tmp_path / "out")
    write_drop(drop, [b"x"] * 4, list(range(4)))
    with pytest.raises(InputError, match="none of 4 rows") as caught:
        embed_parquet(drop, tmp_path / "out", settings())
    assert parts_of(tmp_path / "out") == before
    listed = Path(str(caught.value).rpartition(" ")[2])
    assert pq.read_metadata(listed).num_rows == 4
    verify_artifact(tmp_path / "out")
    write_drop(drop, jpegs(3), list("abc"))
    assert embed_parquet(drop, tmp_path / "out", settings()).rows == 3
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".next", ".partial"))]


def test_drop_without_rows_gives_one_empty_part(tmp_path: Path, settings: Build) -> None:
    drop = write_drop(tmp_path / "d.parquet", [], pa.array([], pa.string()))
    report = embed_parquet(drop, tmp_path / "d", settings())
    assert (report.rows, report.rows_in) == (0, 0)
    assert table_of(tmp_path / "d").num_rows == 0
    assert embed_parquet(drop, tmp_path / "d", settings()).up_to_date


def test_is_valid_is_ignored_when_not_filtering(tmp_path: Path, settings: Build) -> None:
    drop = write_drop(tmp_path / "d.parquet", jpegs(3), [1, 2, 3], valid=[True, False, None])
    report = embed_parquet(drop, tmp_path / "d", settings("inference.filter_valid=false"))
    assert report.rows == 3


@pytest.mark.parametrize("form", ["large_binary", "binary_view", "struct"])
def test_image_bytes_in_every_form(form: str, tmp_path: Path, settings: Build) -> None:
    data: list[bytes | None] = [*jpegs(5), None]
    if form == "struct":
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        images = pa.array([None if item is None else {"bytes": item, "path": "x.jpg"} for item in data], kind)
    else:
        images = pa.array(data, getattr(pa, form)())
    report = embed_parquet(write_drop(tmp_path / "d.parquet", images, list(range(6))), tmp_path / "d", settings())
    assert (report.rows, dict(report.rejected)) == (5, {"image_null": 1})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"OSMID": [1]}, "missing column image_bytes"),
        ({"image_bytes": [b"x"]}, "missing column OSMID"),
        ({"image_bytes": [1], "OSMID": [1]}, "image_bytes is int64"),
        ({"image_bytes": [b"x"], "OSMID": [[1, 2]]}, "identifier must be a single value"),
        ({"image_bytes": [b"x"], "OSMID": [{"a": 1}]}, "identifier must be a single value"),
        ({"image_bytes": [b"x"], "OSMID": [1], "is_valid": ["yes"]}, "is_valid is string"),
    ],
)
def test_unfit_drops_are_refused(columns: dict[str, Any], message: str, tmp_path: Path, settings: Build) -> None:
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    with pytest.raises(InputError, match=message):
        embed_parquet(tmp_path / "d.parquet", tmp_path / "d", settings())
    assert not (tmp_path / "d").exists()


def test_missing_and_truncated_drops_are_refused(tmp_path: Path, settings: Build) -> None:
    with pytest.raises(InputError, match="no such file"):
        embed_parquet(tmp_path / "nothing.parquet", tmp_path / "d", settings())
    drop = write_drop(tmp_path / "d.parquet", jpegs(3), [1, 2, 3])
    drop.write_bytes(drop.read_bytes()[:-20])
    with pytest.raises(InputError, match="not a readable parquet"):
        embed_parquet(drop, tmp_path / "d", settings())


def test_damaged_page_keeps_what_came_before_and_a_whole_file_completes_it(tmp_path: Path, settings: Build) -> None:
    images = jpegs(40)
    drop = write_drop(tmp_path / "d.parquet", images, list(range(40)), row_group_size=20)
    whole = drop.read_bytes()
    damaged = bytearray(whole)
    place = whole.index(images[33]) + 200
    damaged[place] ^= 4
    drop.write_bytes(bytes(damaged))
    with pytest.raises(InputError, match="row group 1 is damaged"):
        embed_parquet(drop, tmp_path / "d", settings())
    root = tmp_path / "d"
    assert list(parts_of(root))[:2] == ["rg00000_rb00000.parquet", "rg00000_rb00001.parquet"]
    assert "rg00001_rb00001.parquet" not in parts_of(root)
    assert not state_of(root)["finished"]
    assert not manifest_path(root).exists()
    drop.write_bytes(whole)
    report = embed_parquet(drop, root, settings())
    assert (report.rows, report.rows_in) == (40, 40)
    assert table_of(root)["OSMID"].to_pylist() == list(range(40))


def test_second_run_does_nothing(tmp_path: Path, settings: Build) -> None:
    drop = write_drop(tmp_path / "d.parquet", jpegs(12), list(range(12)))
    first = embed_parquet(drop, tmp_path / "d", settings())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*")}
    second = embed_parquet(drop, tmp_path / "d", settings())
    assert second.up_to_date
    assert (second.rows, second.rejected) == (first.rows, first.rejected)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*")} == before


def test_changed_read_batch_size_loses_nothing(tmp_path: Path, settings: Build) -> None:
    drop = write_drop(tmp_path / "d.parquet", jpegs(40), list(range(40)))
    embed_parquet(drop, tmp_path / "d", settings("inference.limit=20"))
    report = embed_parquet(drop, tmp_path / "d", settings("inference.read_batch_size=7"))
    assert table_of(tmp_path / "d")["OSMID"].to_pylist() == list(range(40))
    assert report.details["read_batch_size"] == 10
    assert any("stays 10" in note for note in report.details["notes"])


def test_limit_inside_a_part_keeps_its_work_and_a_longer_run_completes_it(tmp_path: Path, settings: Build) -> None:
    images = jpegs(30)
    images[2] = b"bad"
    images[15] = b"bad"
    drop = write_drop(tmp_path / "d.parquet", images, list(range(30)))
    root = tmp_path / "d"
    short = embed_parquet(drop, root, settings("inference.limit=13"))
    assert (short.rows_in, short.rows) == (13, 12)
    assert rejects_of(root) == [(2, "image_not_jpeg")]
    first_three = vectors_to_numpy(pq.read_table(root / "parts" / "rg00000_rb00001.parquet")["embedding"])
    assert embed_parquet(drop, root, settings("inference.limit=13")).up_to_date
    assert embed_parquet(drop, root, settings("inference.limit=5")).up_to_date

    longer = embed_parquet(drop, root, settings("inference.limit=18"))
    assert (longer.rows_in, longer.rows) == (18, 16)
    whole = embed_parquet(drop, root, settings())
    assert (whole.rows_in, whole.rows) == (30, 28)
    assert table_of(root)["OSMID"].to_pylist() == [row for row in range(30) if row not in {2, 15}]
    assert rejects_of(root) == [(2, "image_not_jpeg"), (15, "image_not_jpeg")]
    kept = vectors_to_numpy(pq.read_table(root / "parts" / "rg00000_rb00001.parquet")["embedding"])[:3]
    np.testing.assert_array_equal(kept, first_three)
    expected = one_by_one([images[row] for row in range(30) if row not in {2, 15}], settings())
    np.testing.assert_allclose(vectors_to_numpy(table_of(root)["embedding"]), expected, atol=2e-6)


def test_output_that_is_a_file_gets_a_sidecar(tmp_path: Path, settings: Build) -> None:
    drop = write_drop(tmp_path / "d.parquet", jpegs(3), [1, 2, 3])
    (tmp_path / "out.parquet").write_text("somebody's file")
    report = embed_parquet(drop, tmp_path / "out.parquet", settings())
    assert report.artifact == tmp_path / "out.parquet.parts"
    assert table_of(tmp_path / "out.parquet.parts").num_rows == 3
    assert (tmp_path / "out.parquet").read_text() == "somebody's file"


def test_other_input_model_or_options_are_refused(tmp_path: Path, settings: Build, backbone_folder: Path) -> None:
    drop = write_drop(tmp_path / "d.parquet", jpegs(3), [1, 2, 3])
    root = tmp_path / "out"
    embed_parquet(drop, root, settings())
    before = parts_of(root)
    other = write_drop(tmp_path / "e.parquet", jpegs(3, seed=9), [1, 2, 3])
    with pytest.raises(ConfigError, match="results are not mixed: choose another folder or delete"):
        embed_parquet(other, root, settings())
    with pytest.raises(ConfigError, match="filter_valid True"):
        embed_parquet(drop, root, settings("inference.filter_valid=false"))
    with pytest.raises(ConfigError, match="precision fp32"):
        embed_parquet(drop, root, settings("inference.precision=bf16"))
    checkpoint = make_checkpoint(tmp_path / "c" / "checkpoint_best.safetensors", backbone_folder, seed=8)
    publish_model(checkpoint, tmp_path / "other-model", settings())
    with pytest.raises(ConfigError, match="model "):
        embed_parquet(drop, root, settings(), model=str(tmp_path / "other-model"))
    assert parts_of(root) == before


def test_status_of_the_lake_knows_when_drop_or_model_changed(
    tmp_path: Path, settings: Build, backbone_folder: Path
) -> None:
    from spatial_core.lake.status import lake_status

    chosen = settings(f"paths.model_dir={tmp_path / 'model'}")
    at = chosen.locations
    publish_model(
        make_checkpoint(at.checkpoint_dir / "checkpoint_best.safetensors", backbone_folder), at.model_dir, chosen
    )
    drop = write_drop(at.drops_dir / "new.parquet", jpegs(5), list(range(5)))
    embed_parquet(drop, at.final_embeddings_dir / "new", chosen)
    pool_buildings(at.final_embeddings_dir / "new", at.building_embeddings_dir / "new.parquet", chosen)

    def states() -> dict[str, tuple[str, str]]:
        return {found.asset: (found.state, found.why) for found in lake_status(chosen) if found.partition == "new"}

    assert states()["final_embeddings"] == ("made", "")
    assert states()["building_embeddings"] == ("made", "")
    write_drop(drop, jpegs(4, seed=9), list(range(4)))
    assert states()["final_embeddings"] == ("stale", "new.parquet was replaced")
    embed_parquet(drop, at.final_embeddings_dir / "new", chosen)
    assert states()["final_embeddings"] == ("made", "")
    assert states()["building_embeddings"][0] == "stale"
    publish_model(make_checkpoint(tmp_path / "c.safetensors", backbone_folder, seed=4), at.model_dir, chosen)
    assert states()["final_embeddings"] == ("stale", "hf_model changed or is new")


def test_a_drop_written_again_with_the_same_bytes_is_compared_once(tmp_path: Path, settings: Build) -> None:
    drop = write_drop(tmp_path / "d.parquet", jpegs(3), [1, 2, 3])
    first = embed_parquet(drop, tmp_path / "out", settings())
    os.utime(drop, ns=(5, 5))
    again = embed_parquet(drop, tmp_path / "out", settings())
    assert again.up_to_date
    assert again.details["drop"] == {**first.details["drop"], "mtime_ns": 5}
    recorded = json.loads(manifest_path(tmp_path / "out").read_text())["report"]
    assert recorded["details"]["drop"]["mtime_ns"] == 5
    assert (recorded["seconds"], recorded["up_to_date"]) == (round(first.seconds, 3), False)
    assert embed_parquet(drop, tmp_path / "out", settings()) == again


def test_same_bytes_under_another_name_are_the_same_input(tmp_path: Path, settings: Build) -> None:
    drop = write_drop(tmp_path / "d.parquet", jpegs(3), [1, 2, 3])
    embed_parquet(drop, tmp_path / "out", settings())
    moved = drop.rename(tmp_path / "moved.parquet")
    assert embed_parquet(moved, tmp_path / "out", settings()).up_to_date


def test_replaced_drop_is_new_data_and_takes_the_place_of_the_old(tmp_path: Path, settings: Build) -> None:
    drop = write_drop(tmp_path / "d.parquet", jpegs(25), list(range(25)))
    root = tmp_path / "out"
    embed_parquet(drop, root, settings())
    write_drop(drop, jpegs(4, seed=9), list(range(900, 904)))
    report = embed_parquet(drop, root, settings("inference.read_batch_size=3"))
    assert table_of(root)["OSMID"].to_pylist() == list(range(900, 904))
    assert list(parts_of(root)) == ["rg00000_rb00000.parquet", "rg00000_rb00001.parquet"]
    assert any("input changed" in note for note in report.details["notes"])
    assert state_of(root)["output_dataset_dir"] == str(root)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".next", ".partial"))]
    verify_artifact(root)


def test_run_killed_while_the_successor_takes_over_is_completed(tmp_path: Path, settings: Build) -> None:
    drop = write_drop(tmp_path / "d.parquet", jpegs(12), list(range(12)))
    root = tmp_path / "out"
    embed_parquet(drop, root, settings())
    before = parts_of(root)
    # What a kill between the two renames leaves: the old one under its doomed name, the new one not yet in place.
    manifest_path(root).unlink()
    root.rename(tmp_path / ".out.next")
    (tmp_path / ".out.discarded.partial").mkdir()
    report = embed_parquet(drop, root, settings())
    assert parts_of(root) == before
    assert report.rows == 12
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".next", ".partial"))]


def test_replaced_drop_that_cannot_be_read_leaves_the_old_results(tmp_path: Path, settings: Build) -> None:
    drop = write_drop(tmp_path / "d.parquet", jpegs(12), list(range(12)))
    root = tmp_path / "out"
    embed_parquet(drop, root, settings())
    before = parts_of(root)
    images = jpegs(30, seed=9)
    write_drop(drop, images, list(range(30)), row_group_size=10)
    whole = drop.read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(images[25]) + 100] ^= 1
    drop.write_bytes(bytes(damaged))
    with pytest.raises(InputError, match="row group 2 is damaged"):
        embed_parquet(drop, root, settings())
    assert parts_of(root) == before
    drop.write_bytes(whole)
    assert embed_parquet(drop, root, settings()).rows == 30
    assert table_of(root)["OSMID"].to_pylist() == list(range(30))


def test_replaced_drop_of_an_unfinished_run_starts_afresh(tmp_path: Path, settings: Build) -> None:
    images = jpegs(30)
    drop = write_drop(tmp_path / "d.parquet", images, list(range(30)), row_group_size=10)
    damaged = bytearray(drop.read_bytes())
    damaged[bytes(damaged).index(images[25]) + 100] ^= 1
    drop.write_bytes(bytes(damaged))
    root = tmp_path / "out"
    with pytest.raises(InputError):
        embed_parquet(drop, root, settings())
    write_drop(drop, jpegs(5, seed=9), list(range(5)))
    report = embed_parquet(drop, root, settings())
    assert table_of(root)["OSMID"].to_pylist() == list(range(5))
    assert report.rows_in == 5


def test_retrained_model_under_the_same_name_replaces_the_vectors(
    tmp_path: Path, settings: Build, backbone_folder: Path
) -> None:
    chosen = settings(f"paths.model_dir={tmp_path / 'model'}")
    drop = write_drop(tmp_path / "d.parquet", jpegs(5), list(range(5)))
    for seed in (1, 2):
        checkpoint = make_checkpoint(tmp_path / "c.safetensors", backbone_folder, seed=seed)
        publish_model(checkpoint, tmp_path / "model", chosen)
        embed_parquet(drop, tmp_path / "out", chosen)
    found = vectors_to_numpy(table_of(tmp_path / "out")["embedding"])
    np.testing.assert_allclose(found, one_by_one(jpegs(5), chosen), atol=2e-6)


def test_folders_of_others_are_left_alone(tmp_path: Path, settings: Build) -> None:
    drop = write_drop(tmp_path / "d.parquet", jpegs(2), [1, 2])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("text")
    with pytest.raises(ConfigError, match=r"no state\.json"):
        embed_parquet(drop, tmp_path / "out", settings())
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "state.json").write_text(json.dumps({"input_path": str(drop), "model_id": "x", "filter_valid": True}))
    with pytest.raises(ConfigError, match="another program made it"):
        embed_parquet(drop, earlier, settings())
    assert (tmp_path / "out" / "thesis.tex").read_text() == "text"


@pytest.mark.parametrize("name", ["thesis.tex", "parts/mine.parquet"])
def test_new_data_does_not_replace_files_of_others(name: str, tmp_path: Path, settings: Build) -> None:
    drop = write_drop(tmp_path / "d.parquet", jpegs(2), [1, 2])
    root = tmp_path / "out"
    embed_parquet(drop, root, settings())
    (root / name).write_text("mine")
    write_drop(drop, jpegs(3, seed=9), [7, 8, 9])
    with pytest.raises(InputError, match=f"holds {name} and would be replaced"):
        embed_parquet(drop, root, settings())
    (root / name).unlink()
    assert embed_parquet(drop, root, settings()).rows == 3


def test_damaged_part_is_made_again(tmp_path: Path, settings: Build) -> None:
    drop = write_drop(tmp_path / "d.parquet", jpegs(30), list(range(30)))
    root = tmp_path / "out"
    embed_parquet(drop, root, settings())
    before = parts_of(root)
    part = root / "parts" / "rg00000_rb00001.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 16
    part.write_bytes(bytes(data))
    (root / "parts" / "rg00000_rb00002.parquet").write_bytes(b"PAR1 cut")
    report = embed_parquet(drop, root, settings())
    assert not report.up_to_date
    assert parts_of(root) == before


def test_settings_that_have_no_part_in_the_vectors_may_change_between_runs(tmp_path: Path, settings: Build) -> None:
    drop = write_drop(tmp_path / "d.parquet", jpegs(20), list(range(20)))
    root = tmp_path / "out"
    embed_parquet(drop, root, settings("inference.limit=10"))
    stamp = (root / "parts" / "rg00000_rb00000.parquet").stat().st_mtime_ns
    embed_parquet(drop, root, settings("training.num_epochs=3"))
    assert (root / "parts" / "rg00000_rb00000.parquet").stat().st_mtime_ns == stamp


def test_vectors_that_are_not_finite_are_never_written(
    tmp_path: Path, settings: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spatial_core.publishing.loading import PublishedModel

    drop = write_drop(tmp_path / "d.parquet", jpegs(5), list(range(5)))

    def broken(self: PublishedModel, pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.full((len(pixel_values), 256), float("nan"))

    monkeypatch.setattr("spatial_core.publishing.loading.check_golden", lambda folder, published: None)
    monkeypatch.setattr(PublishedModel, "embed", broken)
    with pytest.raises(ModelError, match="not of unit length"):
        embed_parquet(drop, tmp_path / "out", settings())
    assert not parts_of(tmp_path / "out")


_CHILD = """
import sys
from pathlib import Path
from spatial_core.config.settings import Settings
from spatial_core.inference.embed_new import embed_parquet
from spatial_core.inference.pooling import pool_buildings
settings = Settings.from_json(Path(sys.argv[3]).read_text())
embed_parquet(Path(sys.argv[1]), Path(sys.argv[2]), settings, lambda done, total, text: print(done, flush=True))
"""


def test_killed_run_resumes_to_identical_parts(tmp_path: Path, settings: Build) -> None:
    images = jpegs(130)
    images[12] = b"bad"
    drop = write_drop(tmp_path / "d.parquet", images, [str(n) for n in range(130)], row_group_size=45)
    whole = tmp_path / "whole"
    embed_parquet(drop, whole, settings())

    root = tmp_path / "killed"
    (tmp_path / "settings.json").write_text(settings().to_json())
    (tmp_path / "child.py").write_text(textwrap.dedent(_CHILD))
    child = subprocess.Popen(
        [sys.executable, str(tmp_path / "child.py"), str(drop), str(root), str(tmp_path / "settings.json")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= 40:
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not state_of(root)["finished"]
    done = parts_of(root)
    assert done
    assert all(parts_of(whole)[name] == data for name, data in done.items())

    report = embed_parquet(drop, root, settings())
    assert parts_of(root) == parts_of(whole)
    assert (root / "rejects.parquet").read_bytes() == (whole / "rejects.parquet").read_bytes()
    assert (report.rows, report.rows_in) == (129, 130)


def test_run_that_is_told_to_stop_finishes_its_part_and_resumes_to_identical_parts(
    tmp_path: Path, settings: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop = write_drop(tmp_path / "d.parquet", [*jpegs(35), b"no image"], list(range(36)))
    embed_parquet(drop, tmp_path / "whole", settings())
    monkeypatch.setattr(interruption, "_stop", interruption._Stop())

    def stop(done: int, total: int | None, message: str) -> None:
        if done >= 10:
            interruption.request_stop()

    with pytest.raises(Interrupted, match="10 of 36 rows are embedded; run again"):
        embed_parquet(drop, tmp_path / "stopped", settings(), stop)
    assert len(parts_of(tmp_path / "stopped")) == 1
    assert not state_of(tmp_path / "stopped")["finished"]
    with pytest.raises(Interrupted, match="10 of 36 rows"):
        embed_parquet(drop, tmp_path / "stopped", settings())
    monkeypatch.setattr(interruption, "_stop", interruption._Stop())
    report = embed_parquet(drop, tmp_path / "stopped", settings())
    assert (report.rows, report.rejected) == (35, {"image_not_jpeg": 1})
    assert parts_of(tmp_path / "stopped") == parts_of(tmp_path / "whole")


def test_two_writers_of_one_data_set_do_not_meet(tmp_path: Path, settings: Build) -> None:
    from spatial_core.errors import ArtifactBusy
    from spatial_core.storage.atomic import exclusive

    drop = write_drop(tmp_path / "d.parquet", jpegs(2), [1, 2])
    with exclusive(tmp_path / "out"), pytest.raises(ArtifactBusy):
        embed_parquet(drop, tmp_path / "out", settings())


def test_unpinned_hub_models_and_unknown_folders_are_refused(tmp_path: Path, settings: Build) -> None:
    drop = write_drop(tmp_path / "d.parquet", jpegs(2), [1, 2])
    with pytest.raises(ModelError, match="not pinned"):
        embed_parquet(drop, tmp_path / "out", settings(), model="someone/facades")
    with pytest.raises(ModelError, match="not pinned"):
        embed_parquet(drop, tmp_path / "out", settings(), model="someone/facades@main")
    with pytest.raises(InputError, match="no such model folder"):
        embed_parquet(drop, tmp_path / "out", settings(), model=str(tmp_path / "nowhere" / "deep"))
    with pytest.raises(InputError, match=r"no MANIFEST\.json"):
        embed_parquet(drop, tmp_path / "out", settings(), model=str(tmp_path))

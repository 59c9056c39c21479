"""Examples are drawn fairly, hold true neighbours, and show their pictures or say why not."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import simplejpeg
import torch

from spatial_core.evaluation.gallery import Gallery, choose_examples
from spatial_core.evaluation.page_gallery import gallery_section
from spatial_core.evaluation.scores import Queries, run_queries
from spatial_core.evaluation.spaces import build_spaces
from spatial_core.evaluation.split_data import SplitData, read_split
from spatial_core.evaluation.thumbnails import Thumbnails, read_thumbnails
from spatial_core.metric_learning.checkpoint import load_checkpoint
from spatial_core.retrieval.metrics import select_queries


def searched(lake: object) -> tuple[SplitData, torch.Tensor, Queries]:
    split = read_split(lake.merged / "test.parquet", "test")
    spaces = build_spaces(split, load_checkpoint(lake.checkpoint).projector, None, torch.device("cpu"), seed=1)
    rows = select_queries(split.labels, 1000, 0, seed=1)
    return split, spaces["projector"], run_queries(spaces, split.labels, rows, torch.device("cpu"))


def test_examples_agree_with_a_sort_of_all_images(make_lake: Callable[..., object]) -> None:
    split, vectors, queries = searched(make_lake({"train": 3, "test": 40}, pictures=False))
    gallery = choose_examples(split, vectors, queries, 6, seed=2)
    assert len(gallery.right) == 6 and 0 < len(gallery.wrong) <= 6
    examples = [*gallery.right, *gallery.wrong]
    assert len({example.query.building for example in examples}) == len(examples)
    for example in examples:
        row = example.query.row
        cosines = [(float(vectors[row] @ vectors[i]), i) for i in range(len(split)) if i != row]
        order = sorted(cosines, reverse=True)
        assert [shown.row for shown in example.neighbours] == [i for _, i in order[:5]]
        ranks = [rank for rank, (_, i) in enumerate(order, start=1) if split.labels[i] == split.labels[row]]
        assert example.truth_rank == ranks[0]
        assert example.truth.row == order[ranks[0] - 1][1] and example.truth.right
        assert [shown.right for shown in example.neighbours] == [
            bool(split.labels[shown.row] == split.labels[row]) for shown in example.neighbours
        ]
        assert split.images[row].as_py() == example.query.image
    assert all(example.truth_rank == 1 for example in gallery.right)
    assert [example.truth_rank for example in gallery.wrong] == sorted(example.truth_rank for example in gallery.wrong)
    assert gallery.wrong[0].truth_rank > 1
    assert choose_examples(split, vectors, queries, 6, seed=2) == gallery
    assert choose_examples(split, vectors, queries, 6, seed=3) != gallery
    assert choose_examples(split, vectors, queries, 0, seed=2) == Gallery("test")


def test_pictures_come_from_the_tars_and_the_rest_has_a_reason(make_lake: Callable[..., object]) -> None:
    lake = make_lake({"train": 3, "test": 12})
    split = read_split(lake.merged / "test.parquet", "test")
    images, datasets = split.images.to_pylist(), split.datasets.tolist()

    def read() -> Thumbnails:
        return read_thumbnails([*images, "0001_999999"], [*datasets, 1], lake.intermediates, lake.raw)

    found = read()
    assert set(found.pictures) == set(images) and found.missing == ()
    assert found.reasons == {"0001_999999": "not listed in 0001.parquet"}
    kind, _, data = found.pictures[images[0]].partition(",")
    assert kind == "data:image/jpeg;base64"
    assert simplejpeg.decode_jpeg(base64.b64decode(data)).shape == (160, 160, 3)
    assert read() == found

    own = {number: [image for image, own in zip(images, datasets, strict=True) if own == number] for number in (1, 2)}
    tar = lake.raw / "0001.tar"
    place = pq.read_table(lake.intermediates / "0001.parquet", filters=[("streetview_image_id", "=", own[1][0])])
    damaged = bytearray(tar.read_bytes())
    damaged[place.column("image_offset")[0].as_py() + 900] ^= 1
    tar.write_bytes(damaged)
    (lake.raw / "0002.tar").unlink()
    found = read()
    assert found.missing == ("0002.tar",)
    assert found.reasons[own[1][0]] == "0001.tar changed since it was read"
    assert set(found.pictures) == set(own[1][1:])
    assert {found.reasons[image] for image in own[2]} == {"0002.tar is not in the raw folder"}

    tar.write_bytes(b"cut")
    assert not read().pictures
    (lake.intermediates / "0002.parquet").unlink()
    table = pq.read_table(lake.intermediates / "0001.parquet")
    pq.write_table(table.drop_columns("image_offset"), lake.intermediates / "0001.parquet")
    found = read()
    assert found.missing == ("0002.parquet",)
    assert found.reasons[own[1][0]] == "0001.parquet records no byte offsets"
    assert found.reasons[own[2][0]] == "0002.parquet is missing from the intermediates"


def test_damaged_intermediates_only_cost_their_pictures(make_lake: Callable[..., object]) -> None:
    lake = make_lake({"train": 3, "test": 12})
    split = read_split(lake.merged / "test.parquet", "test")
    images, datasets = split.images.to_pylist(), split.datasets.tolist()
    path = lake.intermediates / "0001.parquet"
    table = pq.read_table(path)
    pq.write_table(table, path, write_page_checksum=True, use_dictionary=False, compression="none")
    data = bytearray(path.read_bytes())
    group = pq.ParquetFile(path).metadata.row_group(0)
    chunk = group.column(table.schema.names.index("image_offset"))
    data[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    found = read_thumbnails(images, datasets, lake.intermediates, lake.raw)
    assert set(found.reasons.values()) == {"0001.parquet is damaged"}
    assert set(found.pictures) == {image for image, number in zip(images, datasets, strict=True) if number == 2}


def test_a_tar_name_never_leads_out_of_the_raw_folder(make_lake: Callable[..., object], tmp_path: Path) -> None:
    lake = make_lake({"train": 3, "test": 6})
    path = lake.intermediates / "0001.parquet"
    table = pq.read_table(path)
    rows = [{**row, "tar_file": f"../elsewhere/{row['tar_file']}"} for row in table.to_pylist()]
    (lake.root / "elsewhere").mkdir()
    (lake.raw / "0001.tar").rename(lake.root / "elsewhere" / "0001.tar")
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), path)
    image = table.column("streetview_image_id")[0].as_py()
    found = read_thumbnails([image], [1], lake.intermediates, lake.raw)
    assert found.reasons == {image: "0001.tar is not in the raw folder"}


def test_the_section_names_missing_files_and_escapes(make_lake: Callable[..., object]) -> None:
    split, vectors, queries = searched(make_lake({"train": 3, "test": 20}, pictures=False))
    gallery = choose_examples(split, vectors, queries, 2, seed=0)
    first = gallery.right[0].query.image
    section = gallery_section(gallery, Thumbnails({}, {first: "0009.tar <gone>"}, ("0009.tar",)))
    assert "these files are not there: 0009.tar" in section
    assert "0009.tar &lt;gone&gt;" in section
    assert "<img" not in section
    assert "There is no such query" in gallery_section(Gallery("test", gallery.right), Thumbnails({}, {}))

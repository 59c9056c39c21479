"""The stage as a whole: planted truth is found, every part may be missing, the page needs nothing but itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from spatial_core.config.settings import Settings
from spatial_core.errors import ConfigError, DigestMismatch, InputError, ModelError
from spatial_core.evaluation.report import CODE_VERSION, STAGE, evaluate_projector
from spatial_core.jobs.registry import STAGES
from spatial_core.metric_learning.checkpoint import load_checkpoint
from spatial_core.report import Report
from spatial_core.storage.parquet import parquet_sink, read_provenance, vectors_to_arrow
from spatial_core.storage.provenance import verify_artifact

FILES = {"metrics.json", "report.html", "summary.png", "summary.md"}


def settings_for(root: Path, **evaluation: object) -> Settings:
    """Few resamples and examples; a lake folder of its own, so that defaults never reach into another."""
    values = {"bootstrap_samples": 100, "gallery_queries": 3, **evaluation}
    return Settings(paths={"data_dir": root / "lake"}, evaluation=values, base_dir=root)


def evaluate(lake: object, output: Path, settings: Settings | None = None, **paths: Path | None) -> Report:
    given: dict[str, Path | None] = {
        "difficulty": lake.difficulty,
        "intermediates_dir": lake.intermediates,
        "raw_dir": lake.raw,
    }
    return evaluate_projector(
        merged_dir=lake.merged,
        checkpoint=lake.checkpoint,
        output_dir=output,
        settings=settings_for(lake.root) if settings is None else settings,
        **(given | paths),
    )


def metrics_of(output: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in metrics.json")

    return json.loads((output / "metrics.json").read_text(), parse_constant=refuse)


class Page(HTMLParser):
    """Collects what a browser would fetch, the texts, and whether tags close in order."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.fetched: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in {"src", "href", "srcset", "data", "poster", "action", "xlink:href"}:
                self.fetched.append(value or "")
            assert "url(" not in (value or "") and not name.startswith("on")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page_of(output: Path) -> Page:
    text = (output / "report.html").read_text()
    page = Page(text)
    assert all(value.startswith("data:image/jpeg;base64,") for value in page.fetched)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert page.tags.count("script") == 1
    styles = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert styles is not None and "url(" not in styles[1] and "@import" not in styles[1]
    assert "http://" not in text and "https://" not in text
    assert "nan" not in re.findall(r"[a-z]+", text.split("<script>")[0].lower().split("<body>")[1].split("base64")[0])
    return page


def test_the_planted_head_is_found_better_than_everything_else(make_lake: Callable[..., object]) -> None:
    lake = make_lake()
    output = lake.root / "report"
    steps: list[tuple[int, int | None, str]] = []
    report = evaluate_projector(
        merged_dir=lake.merged,
        checkpoint=lake.checkpoint,
        output_dir=output,
        settings=settings_for(lake.root),
        progress=lambda done, total, message: steps.append((done, total, message)),
        difficulty=lake.difficulty,
        intermediates_dir=lake.intermediates,
        raw_dir=lake.raw,
    )
    assert {file.name for file in output.iterdir()} == FILES
    verify_artifact(output)
    assert (report.stage, report.artifact, report.unit) == (STAGE, output, "images")
    assert (STAGES[STAGE].code_version, STAGES[STAGE].target) == (
        CODE_VERSION,
        "spatial_core.evaluation.report:evaluate_projector",
    )
    images = sum(pq.read_metadata(lake.merged / f"{split}.parquet").num_rows for split in ("val", "test"))
    assert report.rows_in == report.kept == images
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps) and steps[-1][:2] == (3, 3)

    metrics = metrics_of(output)
    headline = {(row["split"], row["method"]): row for row in metrics["headline"]}
    assert list(headline)[:5] == [("test", m) for m in ("projector", "backbone", "pca", "random", "chance")]
    assert metrics["headline"] == report.details["headline"]
    for split in ("val", "test"):
        ours, raw = headline[split, "projector"], headline[split, "backbone"]
        assert ours["recall@1_ci"][0] > raw["recall@1_ci"][1]
        assert ours["mAP"] > raw["mAP"] > headline[split, "chance"]["mAP"]
        low, high = headline[split, "random"]["recall@5_ci"]
        assert low <= headline[split, "chance"]["recall@5"] <= high
        assert ours["recall@1000"] is None
        assert metrics["splits"][split]["gain_over_backbone"]["recall@1"]["low"] > 0
        assert len(metrics["splits"][split]["by_difficulty_band"]["bins"]) == 7
        assert metrics["splits"][split]["by_baseline_angle"]["bins"]
        assert metrics["splits"][split]["by_distance"]["bins"]
    assert metrics["provenance"]["model"]["id"] == "seeded:test"
    assert report.rows == headline["val", "projector"]["queries"] + headline["test", "projector"]["queries"]

    page = page_of(output)
    assert len(page.fetched) == len([tag for tag in page.tags if tag == "img"]) > 20
    text = " ".join(page.text)
    recall = f"{100 * headline['test', 'projector']['recall@1']:.1f}\N{NO-BREAK SPACE}%"
    assert f"The nearest image shows the same building {recall} of the time" in text
    for title in ("Training", "Map of the space", "Right and wrong", "Not found", "How it was measured"):
        assert title in text
    assert str(lake.root) not in (output / "report.html").read_text() + (output / "metrics.json").read_text()
    assert (output / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert "| Projector | " in (output / "summary.md").read_text()


def test_the_same_inputs_give_the_same_bytes_and_no_work_twice(make_lake: Callable[..., object]) -> None:
    lake = make_lake({"train": 10, "val": 12, "test": 15})
    first, second = lake.root / "a" / "report", lake.root / "b" / "report"
    made = evaluate(lake, first)
    again = evaluate(lake, first)
    assert not made.up_to_date and again.up_to_date and again.details == made.details
    evaluate(lake, second)
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert not evaluate(lake, first, settings_for(lake.root, gallery_queries=1)).up_to_date
    table = pq.read_table(lake.difficulty)
    pq.write_table(table.slice(0, 40), lake.difficulty)
    assert not evaluate(lake, first, settings_for(lake.root, gallery_queries=1)).up_to_date


def test_only_an_earlier_report_is_replaced(make_lake: Callable[..., object]) -> None:
    lake = make_lake({"train": 10, "val": 12, "test": 15})
    with pytest.raises(InputError, match=r"raw: holds .*\.tar and would be replaced as a whole"):
        evaluate(lake, lake.raw)
    assert list(lake.raw.glob("*.tar"))
    evaluate(lake, lake.root / "report")
    moved = (lake.root / "report").rename(lake.root / "moved")
    assert not evaluate(lake, moved, settings_for(lake.root, gallery_queries=1)).up_to_date
    (moved / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes\.txt"):
        evaluate(lake, moved)
    assert (moved / "notes.txt").read_text() == "mine"


def test_without_geometry_difficulty_history_and_tars(make_lake: Callable[..., object]) -> None:
    lake = make_lake({"train": 10, "val": 8, "test": 12}, geometry=False, pictures=False)
    lake.difficulty.unlink()
    weights = {"model_state_dict": load_checkpoint(lake.checkpoint).projector.state_dict(), "epoch": 4, "metrics": {}}
    lake.checkpoint = lake.root / "checkpoint_best.pt"
    torch.save(weights, lake.checkpoint)
    output = lake.root / "report"
    report = evaluate(lake, output, difficulty=None, intermediates_dir=None, raw_dir=None)
    assert report.details["missing_pictures"] == ["0001.parquet", "0002.parquet"]
    notes = " ".join(report.details["notes"])
    for told in ("0001.parquet is missing from the intermediates", "--intermediates and --raw", "--difficulty"):
        assert told in notes
    metrics = metrics_of(output)["splits"]["test"]
    assert metrics["by_difficulty_band"] == {
        "bins": [],
        "unknown_queries": 0,
        "note": "no difficulty table was given",
    }
    assert "not recorded" in metrics["by_baseline_angle"]["note"] and "not recorded" in metrics["by_distance"]["note"]
    text = " ".join(page_of(output).text)
    assert "these files are not there: 0001.parquet, 0002.parquet" in text
    assert "carries no training history" in text
    assert "no difficulty table was given" in text


def test_the_settings_say_where_table_and_pictures_are(make_lake: Callable[..., object]) -> None:
    lake = make_lake({"train": 5, "val": 5, "test": 8})
    settings = settings_for(lake.root).model_copy(
        update={
            "paths": settings_for(lake.root).paths.model_copy(
                update={
                    "difficulty_metadata_path": lake.difficulty,
                    "intermediates_dir": lake.intermediates,
                    "raw_dir": lake.raw,
                }
            )
        }
    )
    output = lake.root / "report"
    report = evaluate(lake, output, settings, difficulty=None, intermediates_dir=None, raw_dir=None)
    assert report.details["missing_pictures"] == []
    assert report.details["notes"] == []
    assert metrics_of(output)["splits"]["test"]["by_difficulty_band"]["bins"]


def test_a_report_without_pictures_is_made_again_when_the_tars_are_back(make_lake: Callable[..., object]) -> None:
    lake = make_lake({"train": 5, "val": 5, "test": 12})
    output, away = lake.root / "report", lake.root / "away"
    (lake.raw / "0001.tar").rename(away)
    assert evaluate(lake, output).details["missing_pictures"] == ["0001.tar"]
    assert "0001.tar is not in the raw folder" in " ".join(page_of(output).text)
    assert evaluate(lake, output).up_to_date
    away.rename(lake.raw / "0001.tar")
    again = evaluate(lake, output)
    assert not again.up_to_date and again.details["missing_pictures"] == []
    assert "0001.tar" not in " ".join(page_of(output).text)
    shutil.rmtree(lake.raw)  # losing the tars later loses nothing that was made
    assert evaluate(lake, output).up_to_date and page_of(output).fetched


@pytest.mark.parametrize(
    "buildings",
    [
        {"train": 6, "val": 0, "test": 0},
        {"train": 6, "val": 1, "test": 1},
        {"train": 6, "val": 2, "test": 3},
        {"train": 6, "test": 4},
        {"train": 0, "val": 4, "test": 5},
    ],
)
def test_tiny_and_empty_splits_are_reported_as_such(
    make_lake: Callable[..., object], buildings: dict[str, int]
) -> None:
    lake = make_lake(buildings)
    output = lake.root / "report"
    report = evaluate(lake, output)
    metrics = metrics_of(output)
    for split in ("val", "test"):
        entry = metrics["splits"][split]
        measured = buildings.get(split, 0) > 1
        assert bool(entry["methods"]) == measured == (not entry["note"])
        if split not in buildings:
            assert entry["note"] == "there is no val.parquet: the split has no images"
        elif not measured:
            assert entry["note"].startswith("not enough buildings")
            assert f"{split}: not enough buildings" in " ".join(report.details["notes"])
    assert (metrics["pca"] is None) == (buildings["train"] == 0)
    text = " ".join(page_of(output).text)
    if not report.rows:
        assert report.details["headline"] == [] and "Nothing could be measured yet" in text
        assert "not enough buildings" in (output / "summary.md").read_text()
    if not buildings["train"]:
        assert "the training split is empty" in text


def test_the_largest_building_alone_is_no_retrieval_task(make_lake: Callable[..., object]) -> None:
    lake = make_lake({"train": 4, "val": 2, "test": 2})
    for split in ("val", "test"):
        table = pq.read_table(lake.merged / f"{split}.parquet")
        one = pa.array(["0001_1"] * len(table))
        pq.write_table(table.set_column(table.schema.names.index("building_id"), "building_id", one),
                       lake.merged / f"{split}.parquet")  # fmt: skip
    assert evaluate(lake, lake.root / "report").rows == 0


def test_what_merge_found_about_leakage_is_repeated(make_lake: Callable[..., object]) -> None:
    lake = make_lake({"train": 6, "val": 4, "test": 5}, pictures=False)
    leakage = {"test": {"share_within_25m": 0.125}, "val": {}}
    (lake.merged / "report.json").write_text(json.dumps({"leakage": leakage}))
    output = lake.root / "report"
    evaluate(lake, output)
    splits = metrics_of(output)["splits"]
    assert splits["test"]["share_of_buildings_within_25m_of_training"] == 0.125
    assert splits["val"]["share_of_buildings_within_25m_of_training"] is None
    assert "12.5\N{NO-BREAK SPACE}% of its buildings stand within 25 m" in " ".join(page_of(output).text)


def test_a_head_of_another_backbone_is_refused(make_lake: Callable[..., object]) -> None:
    lake = make_lake({"train": 4, "val": 3, "test": 5}, pictures=False)
    path = lake.merged / "test.parquet"
    provenance, table = read_provenance(path), pq.read_table(path)
    assert provenance is not None
    other = type(provenance)(**{**vars(provenance), "model": {"id": "seeded:other", "revision": "1"}})
    with parquet_sink(path, table.schema.remove_metadata(), other) as writer:
        writer.write_table(table)
    with pytest.raises(ModelError, match=r"test\.parquet: holds features of .*seeded:other.*seeded:test"):
        evaluate(lake, lake.root / "report")
    features = np.zeros((len(table), 20), dtype=np.float32)
    place = table.schema.names.index("embedding")
    narrow = vectors_to_arrow(features)
    narrow_table = table.set_column(place, table.schema.field(place).with_type(narrow.type), narrow)
    pq.write_table(narrow_table.replace_schema_metadata(), path)
    with pytest.raises(ModelError, match="features have 20 dimensions"):
        evaluate(lake, lake.root / "report")
    assert not (lake.root / "report").exists()


def test_a_collapsed_head_gets_an_honest_report(make_lake: Callable[..., object]) -> None:
    lake = make_lake({"train": 6, "val": 5, "test": 9}, pictures=False)
    table = pq.read_table(lake.merged / "test.parquet")
    vectors = vectors_to_arrow(np.ones((len(table), 48), dtype=np.float32))
    place = table.schema.names.index("embedding")
    with parquet_sink(
        lake.merged / "test.parquet", table.schema, read_provenance(lake.merged / "test.parquet")
    ) as writer:
        writer.write_table(table.set_column(place, table.schema.field(place), vectors))
    output = lake.root / "report"
    evaluate(lake, output)
    row = metrics_of(output)["headline"][0]
    assert (row["split"], row["method"], row["recall@1"]) == ("test", "projector", 0.0)
    page_of(output)


def test_missing_and_damaged_inputs_are_named(make_lake: Callable[..., object]) -> None:
    lake = make_lake({"train": 4, "val": 3, "test": 5}, pictures=False)
    output = lake.root / "report"
    with pytest.raises(InputError, match=r"nowhere/train\.parquet: no such file"):
        evaluate_projector(lake.root / "nowhere", lake.checkpoint, output, settings_for(lake.root))
    with pytest.raises(InputError, match="no such checkpoint"):
        evaluate_projector(lake.merged, lake.root / "none.safetensors", output, settings_for(lake.root))
    settings = settings_for(lake.root).model_copy(
        update={"infrastructure": settings_for(lake.root).infrastructure.model_copy(update={"device": "gpu"})}
    )
    with pytest.raises(ConfigError, match=r"infrastructure\.device is 'gpu'"):
        evaluate(lake, output, settings)
    data = bytearray(lake.checkpoint.read_bytes())
    data[-3] ^= 1
    lake.checkpoint.write_bytes(data)
    with pytest.raises(DigestMismatch, match="damaged"):
        evaluate(lake, output)
    assert not output.exists()


@pytest.mark.browser
def test_the_page_runs_in_a_browser_without_a_network(make_lake: Callable[..., object], tmp_path: Path) -> None:
    lake = make_lake({"train": 5, "val": 5, "test": 15})
    output = lake.root / "report"
    evaluate(lake, output)
    # The page lights a building up by itself here, as a visitor's pointer would, and writes down what it asked for.
    probe = """<script>
      const mark = document.querySelector(".map circle");
      mark.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
      const lit = [...document.querySelectorAll(".map")].map((map) => map.querySelectorAll("circle.on").length);
      const seen = performance.getEntriesByType("resource").filter((entry) => !entry.name.startsWith("data:"));
      document.body.dataset.probe = JSON.stringify({lit, fetched: seen.length, wide: document.body.scrollWidth});
    </script></body>"""
    page = tmp_path / "probe.html"
    page.write_text((output / "report.html").read_text().replace("</body>", probe))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--window-size=1200,900"]
    command = ["chromium", *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'data-probe="([^"]*)"', shown)
    assert found is not None
    probed = json.loads(found[1].replace("&quot;", '"'))
    assert len(probed["lit"]) == 2 and probed["lit"][0] == probed["lit"][1] > 1
    assert probed["fetched"] == 0
    assert probed["wide"] <= 1200

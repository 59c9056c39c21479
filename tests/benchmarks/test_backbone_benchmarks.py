"""The backbone benchmarks compare equal work, and count the work of a transformer rightly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, Dinov2Config, DINOv3ViTConfig

from benchmarks import backbone, backbone_gpu, preprocessing
from benchmarks.matmul import matmul_flops, transformer_flops

TINY = {**backbone.SHAPE, "num_hidden_layers": 1, "hidden_size": 96, "num_attention_heads": 2}


def test_preprocessing_gives_the_pixels_of_the_processor(tmp_path: Path) -> None:
    pictures = preprocessing.make_pictures(tmp_path, 20)
    ours, reference = preprocessing.ours(pictures), preprocessing.reference(pictures)
    assert ours["images"] == reference["images"] == 20
    for found, expected in zip(ours["sample"], reference["sample"], strict=True):
        assert found == pytest.approx(expected, abs=1.01 / 255 / 0.224)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_pipelines_give_the_same_features(precision: str, tmp_path: Path) -> None:
    task = backbone.Task(preprocessing.make_pictures(tmp_path, 20), backbone.make_model(tmp_path / "model", TINY))
    ours, reference = backbone.ours(precision, task), backbone.reference(task)
    assert ours["rows"] == reference["rows"] == 20
    found, expected = (torch.tensor(each["sample"]) for each in (ours, reference))
    least = 0.9999 if precision == "fp32" else 0.999
    assert torch.nn.functional.cosine_similarity(found, expected).min() >= least


@pytest.mark.parametrize(
    ("config", "side_px"),
    [
        (Dinov2Config(**TINY), 224),
        (DINOv3ViTConfig(**backbone_gpu._COMMON, **backbone_gpu.SHAPES["tiny"]), 256),
        (DINOv3ViTConfig(**backbone_gpu._COMMON, **{**backbone_gpu.SHAPES["tiny"], "use_gated_mlp": True}), 256),
    ],
)
def test_operations_of_a_transformer_are_counted_as_torch_counts_them(config: object, side_px: int) -> None:
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=torch.zeros(1, 3, side_px, side_px))
    assert transformer_flops(config, side_px) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_gpu_benchmark_runs_where_there_is_none(tmp_path: Path) -> None:
    measured = backbone_gpu.measure_shape("tiny", torch.device("cpu"), batch=4, images=12)
    assert measured.forward_size == 4
    assert min(measured.stream_per_s, measured.model_per_s, measured.decode_per_s, measured.matmul_tflops) > 0
    assert 0 < measured.share < 1
    assert backbone_gpu.table([measured]).row_count == 1
    backbone_gpu.save([measured], tmp_path / "results" / "gpu.json")
    assert json.loads((tmp_path / "results" / "gpu.json").read_text())[0]["shape"] == "tiny"


def test_matmul_rate_is_a_rate() -> None:
    assert matmul_flops(torch.float32, torch.device("cpu"), (64, 64, 64), seconds=0.05) > 1e6

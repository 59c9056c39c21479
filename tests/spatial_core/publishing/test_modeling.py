"""The shipped classes themselves: same head as training, same pixels, clear refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spatial_core.backbones.preprocessing import parse_preprocessing
from spatial_core.metric_learning.projector import Projector, ProjectorConfig
from spatial_core.publishing.configuration_spatial_embeddings import SpatialEmbeddingsConfig
from spatial_core.publishing.image_processing_spatial_embeddings import SpatialEmbeddingsImageProcessor
from spatial_core.publishing.model_folder import publish_model
from spatial_core.publishing.modeling_spatial_embeddings import SpatialEmbeddingsModel, SpatialEmbeddingsProjector
from tests.data.make_model import make_checkpoint, model_settings, preprocessor
from tests.spatial_core.publishing.conftest import Backbones


@pytest.mark.parametrize("use_residual", [True, False])
@pytest.mark.parametrize("use_layer_norm", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_shipped_head_is_the_training_head(use_residual: bool, use_layer_norm: bool, activation: Any) -> None:
    options: dict[str, Any] = {
        "input_dim": 12,
        "hidden_widths": (9, 31),
        "output_dim": 7,
        "activation": activation,
        "use_residual": use_residual,
        "use_layer_norm": use_layer_norm,
    }
    torch.manual_seed(3)
    trained = Projector(ProjectorConfig(**options, dropout=0.3)).eval()
    shipped = SpatialEmbeddingsProjector(SpatialEmbeddingsConfig(**options, dropout=0.3)).eval()
    shipped.load_state_dict(trained.state_dict())
    features = torch.randn(20, 12) * 3
    assert torch.equal(shipped(features), trained(features))


def test_gradients_flow_through_the_shipped_model(backbones: Backbones, tmp_path: Path) -> None:
    publish_model(
        make_checkpoint(tmp_path / "c.safetensors", backbones("dinov2")),
        tmp_path / "m",
        model_settings(tmp_path / "lake", backbones("dinov2")),
    )
    model = SpatialEmbeddingsModel.from_pretrained(tmp_path / "m")
    model(pixel_values=torch.randn(2, 3, 56, 56)).embeddings[:, 0].sum().backward()
    assert all(weight.grad is not None for name, weight in model.projector.named_parameters() if "dropout" not in name)


def test_inputs_that_make_no_sense_are_refused(published: Path) -> None:
    model = SpatialEmbeddingsModel.from_pretrained(published).eval()
    with pytest.raises(ValueError, match="either pixel_values or features"):
        model()
    with pytest.raises(ValueError, match="either pixel_values or features"):
        model(pixel_values=torch.zeros(1, 3, 56, 56), features=torch.zeros(1, 32))
    with pytest.raises(ValueError, match="features are 31 wide; this head takes 32"):
        model(features=torch.zeros(1, 31))
    with pytest.raises(ValueError, match="pooling_type"):
        SpatialEmbeddingsConfig(pooling_type="mean")


def test_tuple_outputs_and_batches_agree_with_single_images(published: Path) -> None:
    model = SpatialEmbeddingsModel.from_pretrained(published).eval()
    pixels = torch.randn(3, 3, 56, 56)
    with torch.inference_mode():
        embeddings, pooled, features = model(pixel_values=pixels, return_dict=False)
        single = model(pixel_values=pixels[1:2]).embeddings
        from_features = model(features=features).embeddings
    assert pooled is embeddings
    torch.testing.assert_close(embeddings[1:2], single, atol=1e-6, rtol=0)
    assert torch.equal(from_features, embeddings)


def test_check_golden_notices_drift(published: Path, tmp_path: Path) -> None:
    model = SpatialEmbeddingsModel.from_pretrained(published).eval()
    assert model.check_golden()["max_abs_difference"] <= 1e-6
    with torch.no_grad():
        model.projector.output_layer.weight[0] *= 1.5
    with pytest.raises(ValueError, match="golden vectors are not reproduced"):
        model.check_golden()
    assert not model.training


@pytest.fixture
def head_alone(backbones: Backbones, tmp_path: Path) -> Path:
    settings = model_settings(tmp_path / "lake", backbones("dinov2"), "publishing.include_backbone=false")
    publish_model(make_checkpoint(tmp_path / "c.safetensors", backbones("dinov2")), tmp_path / "m", settings)
    return tmp_path / "m"


def test_head_alone_takes_features_and_refuses_an_unpinned_backbone(head_alone: Path) -> None:
    model = SpatialEmbeddingsModel.from_pretrained(head_alone).eval()
    assert model(features=torch.randn(2, 32)).embeddings.shape == (2, 256)
    model.check_golden()
    for revision in ("main", "v1", "4c2d422eace38349", None):
        model.config.backbone_model_name = "someone/dino"
        model.config.backbone_revision = revision
        with pytest.raises(ValueError, match="pinned to no commit"):
            model(pixel_values=torch.zeros(1, 3, 56, 56))


def test_folder_in_the_way_is_not_taken_for_the_hub_model(
    head_alone: Path, backbones: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SpatialEmbeddingsModel.from_pretrained(head_alone).eval()
    shutil.copytree(backbones("dinov2"), tmp_path / "cwd" / model.config.backbone_model_name)
    monkeypatch.chdir(tmp_path / "cwd")
    with pytest.raises(ValueError, match="pinned to no commit"):
        model.load_backbone()


def test_head_alone_with_the_wrong_backbone_is_noticed(head_alone: Path, backbones: Backbones) -> None:
    model = SpatialEmbeddingsModel.from_pretrained(head_alone).eval()
    model.load_backbone(backbones("dinov2_with_registers"))
    with pytest.raises(ValueError, match="golden vectors are not reproduced"):
        model.check_golden()


@pytest.mark.parametrize("family", ["dinov2", "dinov3_vit"])
@pytest.mark.parametrize("size", [(640, 640), (75, 200), (300, 65), (64, 64)])
def test_shipped_processor_prepares_pixels_as_training_did(family: str, size: tuple[int, int]) -> None:
    preprocessing = parse_preprocessing(preprocessor(family), "here")
    options = {key: value for key, value in preprocessor(family).items() if key != "image_processor_type"}
    processor = SpatialEmbeddingsImageProcessor(**options)
    width, height = size
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = preprocessing.normalise(torch.from_numpy(preprocessing.pixels(image).copy())[None])
    for form in (Image.fromarray(image), image, torch.from_numpy(image), torch.from_numpy(image).permute(2, 0, 1)):
        torch.testing.assert_close(processor(form)["pixel_values"], expected, atol=1e-6, rtol=0)
    assert processor([image, image], return_tensors="np")["pixel_values"].shape[0] == 2


def test_processor_expands_grey_and_refuses_what_it_cannot_read() -> None:
    processor = SpatialEmbeddingsImageProcessor()
    grey = np.arange(100, dtype=np.uint8).reshape(10, 10)
    as_pil = processor(Image.fromarray(grey))["pixel_values"]
    torch.testing.assert_close(processor(grey)["pixel_values"], as_pil)
    with pytest.raises(ValueError, match="uint8 RGB array"):
        processor(np.zeros((10, 10, 3), np.float32))
    with pytest.raises(ValueError, match="options fixed by the model: size"):
        processor(grey, size={"height": 8, "width": 8})

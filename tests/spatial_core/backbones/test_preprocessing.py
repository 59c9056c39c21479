"""Our preprocessing beside transformers' own processors, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spatial_core.backbones.preprocessing import load_preprocessing, parse_preprocessing
from spatial_core.errors import ModelError
from spatial_core.images.decode import ImageError, decode_jpeg

# As published with facebook/dinov2-small and facebook/dinov3-vits16-pretrain-lvd1689m.
DINOV2: dict[str, Any] = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 256},
}
DINOV3: dict[str, Any] = {
    "crop_size": None,
    "data_format": "channels_first",
    "default_to_square": True,
    "device": None,
    "disable_grouping": None,
    "do_center_crop": None,
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "DINOv3ViTImageProcessorFast",
    "image_std": [0.229, 0.224, 0.225],
    "input_data_format": None,
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "return_tensors": None,
    "size": {"height": 224, "width": 224},
}
RECORDS = {"dinov2": DINOV2, "dinov3": DINOV3}
SIZES = [(640, 640), (256, 256), (224, 224), (255, 257), (641, 479), (333, 1000), (1001, 334), (97, 61), (30, 200)]

Reference = Callable[[dict[str, Any], np.ndarray], np.ndarray]


def pil_processor(record: dict[str, Any], image: np.ndarray) -> np.ndarray:
    """transformers' Pillow processor; DINOv3 has none of its own, so its options run on the general one."""
    import transformers

    options = {key: value for key, value in record.items() if value is not None and key != "image_processor_type"}
    options.setdefault("do_center_crop", False)
    if hasattr(transformers, "BitImageProcessorPil"):
        processor = transformers.BitImageProcessorPil(**options)
    else:
        processor = transformers.BitImageProcessor(**options)
    return np.asarray(processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0])


def torchvision_processor(record: dict[str, Any], image: np.ndarray) -> np.ndarray:
    """transformers' torchvision processor, the class the record names."""
    import transformers

    name = record["image_processor_type"]
    fast = name if name.endswith("Fast") or not hasattr(transformers, f"{name}Fast") else f"{name}Fast"
    options = {key: value for key, value in record.items() if value is not None and key != "image_processor_type"}
    processor = getattr(transformers, fast)(**options)
    return np.asarray(processor(Image.fromarray(image), return_tensors="pt")["pixel_values"][0])


def float_arithmetic(record: dict[str, Any], image: np.ndarray) -> np.ndarray:
    """DINOv3's order of steps (rescale, resize, normalise) in float32, without rounding to grey levels between."""
    values = torch.from_numpy(image).permute(2, 0, 1)[None].float() * record["rescale_factor"]
    mode = {2: "bilinear", 3: "bicubic"}[record["resample"]]
    size = record["size"]
    values = torch.nn.functional.interpolate(values, (size["height"], size["width"]), mode=mode, antialias=True)
    mean, std = (torch.tensor(record[key])[:, None, None] for key in ("image_mean", "image_std"))
    return ((values[0] - mean) / std).numpy()


# torchvision has no build for every machine; where it cannot be imported the Pillow processors are the reference.
REFERENCES: dict[str, list[Reference]] = {"dinov2": [pil_processor], "dinov3": [pil_processor, float_arithmetic]}
if importlib.util.find_spec("torchvision") is not None:
    for references in REFERENCES.values():
        references.append(torchvision_processor)
CASES = [(family, reference) for family, references in REFERENCES.items() for reference in references]


def grey_levels(normalised: np.ndarray, record: dict[str, Any]) -> np.ndarray:
    mean, std = (np.asarray(record[key])[:, None, None] for key in ("image_mean", "image_std"))
    return (np.asarray(normalised, dtype=np.float64) * std + mean) * 255


def ours(record: dict[str, Any], image: np.ndarray) -> np.ndarray:
    preprocessing = parse_preprocessing(record, "test")
    pixels = torch.from_numpy(np.ascontiguousarray(preprocessing.pixels(image)))
    batch = preprocessing.normalise(pixels[None])
    assert batch.shape == (1, 3, *preprocessing.output_size)
    assert batch.dtype == torch.float32
    alone = np.empty_like(batch[0].numpy())
    preprocessing.normalise_into(preprocessing.pixels(image), alone)
    np.testing.assert_array_equal(alone, batch[0].numpy())
    return alone


def apart(family: str, reference: Reference, image: np.ndarray) -> np.ndarray:
    """Distance in grey levels of every value, before normalisation."""
    record = RECORDS[family]
    return np.abs(grey_levels(ours(record, image), record) - grey_levels(reference(record, image), record))


def pictures(height: int, width: int) -> list[np.ndarray]:
    """Noise, the hardest case for rounding; and hard black and white edges, the hardest for bicubic overshoot."""
    random = np.random.default_rng(height * 10_000 + width)
    noise = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    edges = np.where(random.random((height // 8 + 1, width // 8 + 1, 1)) < 0.5, 0, 255).astype(np.uint8)
    edges = np.repeat(np.repeat(np.repeat(edges, 8, 0), 8, 1), 3, 2)[:height, :width]
    return [noise, np.ascontiguousarray(edges)]


@pytest.mark.parametrize(("family", "reference"), CASES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_agrees_with_transformers(family: str, reference: Reference, height: int, width: int) -> None:
    if reference is torchvision_processor and height > 2 * width:
        # Its pictures differ from those of the Pillow processor here, which are the ones followed (see images.resize).
        width = height // 2
    for picture in pictures(height, width):
        difference = apart(family, reference, picture)
        # Grey levels are rounded between the two passes, so pure noise gets past 1 in a few values of 150 000.
        assert difference.max() <= 2 + 1e-3
        assert (difference > 1 + 1e-3).mean() <= 5e-4


@pytest.mark.real_data
@pytest.mark.parametrize(("family", "reference"), CASES)
def test_agrees_with_transformers_on_photographs(family: str, reference: Reference, real_data: Path) -> None:
    compared = 0
    for name in ("0201", "0202"):
        with tarfile.open(real_data / "buildings" / f"{name}.tar") as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    handle = tar.extractfile(member)
                    assert handle is not None
                    photograph = decode_jpeg(handle.read())
                    height, width = photograph.shape[:2]
                    crops = [photograph, photograph[37:, : width * 2 // 3]]
                    if reference is not torchvision_processor:
                        crops.append(photograph[:, : height // 3])
                    else:
                        crops.append(photograph[: width // 3])
                    for image in crops:
                        difference = apart(family, reference, np.ascontiguousarray(image))
                        # Whole photographs never pass 1; odd crops do in one or two of a million values.
                        limit = 1 if image is photograph else 2
                        assert difference.max() <= limit + 1e-3, f"{member.name} {image.shape}: {difference.max()}"
                        assert (difference > 1 + 1e-3).mean() <= 2e-4
                        compared += 1
    assert compared == 3 * 60


def test_defaults_of_the_class_fill_in_for_missing_and_null_keys() -> None:
    bit = parse_preprocessing({"image_processor_type": "BitImageProcessor", "resample": None}, "test")
    assert (bit.shortest_edge, bit.crop, bit.interpolation) == (224, (224, 224), "bicubic")
    assert bit.mean[0] == pytest.approx(0.48145466)
    dinov3 = parse_preprocessing({"image_processor_type": "DINOv3ViTImageProcessor"}, "test")
    assert (dinov3.resize_to, dinov3.crop, dinov3.interpolation) == ((224, 224), None, "bilinear")


def test_a_plain_number_as_size_means_what_the_class_means_by_it() -> None:
    bit = parse_preprocessing({**DINOV2, "size": 300, "crop_size": 224}, "test")
    assert (bit.shortest_edge, bit.crop) == (300, (224, 224))
    dinov3 = parse_preprocessing({**DINOV3, "size": 512}, "test")
    assert dinov3.output_size == (512, 512)


def test_without_rescaling_and_normalising_grey_levels_come_through() -> None:
    record = {**DINOV3, "do_rescale": False, "do_normalize": False}
    image = pictures(224, 224)[0]
    np.testing.assert_array_equal(ours(record, image), image.transpose(2, 0, 1).astype(np.float32))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_processor_type": "CLIPSegProcessor"}, "CLIPSegProcessor"),
        ({"image_processor_type": None}, "image_processor_type"),
        ({"do_pad": True}, "do_pad"),
        ({"do_something_new": 3}, "do_something_new"),
        ({"resample": 1}, "resample"),
        ({"do_resize": False}, "do_resize"),
        ({"size": {"shortest_edge": 256, "longest_edge": 512}}, "size"),
        ({"size": "large"}, "size"),
        ({"do_center_crop": False}, "do_center_crop"),
        ({"crop_size": {"height": 300, "width": 224}}, "crop_size"),
        ({"crop_size": {"height": 224}}, "crop_size"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named) as caught:
        parse_preprocessing({**DINOV2, **change}, "model/preprocessor_config.json")
    assert "model/preprocessor_config.json" in str(caught.value)


def test_dinov3_order_of_steps_is_not_imitated_for_bicubic() -> None:
    with pytest.raises(ModelError, match="resample = 3"):
        parse_preprocessing({**DINOV3, "resample": 3}, "test")


def test_an_elongated_picture_is_rejected_before_it_grows() -> None:
    preprocessing = parse_preprocessing(DINOV2, "test")
    with pytest.raises(ImageError) as caught:
        preprocessing.pixels(np.zeros((8, 65_000, 3), np.uint8))
    assert caught.value.reason == "image_elongated"


def test_the_id_follows_what_changes_pixels_and_nothing_else() -> None:
    first = parse_preprocessing(DINOV2, "a").id
    assert first == parse_preprocessing({**DINOV2, "processor_class": "X", "return_tensors": "pt"}, "b").id
    changes: list[dict[str, Any]] = [
        {"size": {"shortest_edge": 257}},
        {"resample": 2},
        {"crop_size": 196},
        {"image_mean": [0.5, 0.5, 0.5]},
        {"rescale_factor": 1 / 256},
    ]
    ids = {parse_preprocessing({**DINOV2, **change}, "c").id for change in changes}
    assert len(ids) == len(changes)
    assert first not in ids


def test_reads_either_file_of_a_model_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no preprocessor_config\.json"):
        load_preprocessing(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": DINOV2}))
    nested = load_preprocessing(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(DINOV3))
    assert load_preprocessing(tmp_path) == parse_preprocessing(DINOV3, "test")
    assert nested == parse_preprocessing(DINOV2, "test")
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match="not readable JSON"):
        load_preprocessing(tmp_path)

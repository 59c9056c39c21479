"""DINOv2, with and without register tokens (https://github.com/facebookresearch/dinov2)."""

from __future__ import annotations

from spatial_core.backbones.family import Demo, Family

_PIXELS = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 192},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 168, "width": 168},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}
_SMALL = {
    "hidden_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "mlp_ratio": 2,
    "patch_size": 14,
    "image_size": 168,
    "layerscale_value": 1.0,
    "initializer_range": 0.02,
}

FAMILY = Family(
    name="dinov2",
    model_types=("dinov2", "dinov2_with_registers"),
    license="apache-2.0",
    license_name="Apache License 2.0",
    license_url="https://github.com/facebookresearch/dinov2/blob/main/LICENSE",
    demos={
        "dinov2-demo": Demo("dinov2", _SMALL, _PIXELS),
        "dinov2-registers-demo": Demo("dinov2_with_registers", {**_SMALL, "num_register_tokens": 4}, _PIXELS),
    },
)

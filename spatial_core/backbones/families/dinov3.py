"""DINOv3, vision transformers and ConvNeXt (https://github.com/facebookresearch/dinov3)."""

from __future__ import annotations

from spatial_core.backbones.family import Demo, Family

FAMILY = Family(
    name="dinov3",
    model_types=("dinov3_vit", "dinov3_convnext"),
    license="other",
    license_name="dinov3-license",
    license_url="https://ai.meta.com/resources/models-and-libraries/dinov3-license",
    demos={
        "dinov3-demo": Demo(
            "dinov3_vit",
            {
                "hidden_size": 384,
                "intermediate_size": 768,
                "num_hidden_layers": 3,
                "num_attention_heads": 12,
                "patch_size": 16,
                "image_size": 176,
                "num_register_tokens": 4,
                "layerscale_value": 1.0,
                "initializer_range": 0.02,
            },
            {
                "image_processor_type": "DINOv3ViTImageProcessorFast",
                "do_resize": True,
                "size": {"height": 176, "width": 176},
                "resample": 2,
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": [0.485, 0.456, 0.406],
                "image_std": [0.229, 0.224, 0.225],
            },
        )
    },
)

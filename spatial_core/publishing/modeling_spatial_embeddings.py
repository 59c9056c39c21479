"""The published "same building" model: vision backbone, pooling, projection head, unit-length embedding.

This file is shipped inside the model folder and runs without spatial_core: it may import nothing but torch,
transformers and its own configuration. It is kept loadable by transformers 4.57 and 5: the backbone is built from a
nested configuration, never fetched inside `__init__` (which runs on the meta device), and no buffer is created here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput, cached_file

from .configuration_spatial_embeddings import SpatialEmbeddingsConfig

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


@dataclass
class SpatialEmbeddingsOutput(ModelOutput):  # type: ignore[misc]
    """What a forward pass returns.

    Args:
        embeddings: (B, output_dim) float32, unit length.
        pooler_output: the same tensor, under the name that generic tools look for.
        features: (B, input_dim) pooled backbone features, not normalised.
    """

    embeddings: Tensor | None = None
    pooler_output: Tensor | None = None
    features: Tensor | None = None


class SpatialEmbeddingsProjector(nn.Module):
    """Features (B, input_dim) -> unit vectors (B, output_dim).

    Hidden blocks are linear, LayerNorm, activation, dropout; the output block is linear, LayerNorm, dropout; a linear
    map of the input is added to it; the sum is L2-normalised in float32.
    """

    def __init__(self, config: SpatialEmbeddingsConfig) -> None:
        super().__init__()
        widths = config.hidden_widths
        norm = nn.LayerNorm if config.use_layer_norm else nn.Identity
        self.input_layer = nn.Linear(config.input_dim, widths[0])
        self.input_norm = norm(widths[0])
        self.hidden_layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.hidden_norms = nn.ModuleList(norm(width) for width in widths[1:])
        self.output_layer = nn.Linear(widths[-1], config.output_dim)
        self.output_norm = norm(config.output_dim)
        self.residual_proj = nn.Linear(config.input_dim, config.output_dim) if config.use_residual else None
        self.activation = _ACTIVATIONS[config.activation]()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.dropout(self.activation(self.input_norm(self.input_layer(features))))
        for layer, norm in zip(self.hidden_layers, self.hidden_norms, strict=True):
            hidden = self.dropout(self.activation(norm(layer(hidden))))
        projected = self.dropout(self.output_norm(self.output_layer(hidden)))
        if self.residual_proj is not None:
            projected = projected + self.residual_proj(features)
        return functional.normalize(projected.float(), dim=-1)


class SpatialEmbeddingsModel(PreTrainedModel):  # type: ignore[misc]
    """Images -> embeddings in which pictures of one building lie close together.

    Use it through `AutoModel.from_pretrained(folder_or_id, trust_remote_code=True)`. A head published alone fetches its
    backbone at the pinned revision the first time it is given pixels, or when `load_backbone` is called.
    """

    config_class = SpatialEmbeddingsConfig
    base_model_prefix = "spatial_embeddings"
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: SpatialEmbeddingsConfig) -> None:
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config) if config.include_backbone else None
        self.projector = SpatialEmbeddingsProjector(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SpatialEmbeddingsOutput | tuple[Tensor, ...]:
        """Embed images, or features that were pooled from the same backbone before.

        Args:
            pixel_values: (B, 3, H, W), preprocessed as `preprocessor_config.json` says.
            features: (B, input_dim) pooled backbone features; give these or `pixel_values`.
            return_dict: False returns a plain tuple.

        Raises:
            ValueError: if not exactly one of the two inputs is given, or features are of another width.
        """
        if features is None and pixel_values is not None:
            features = self.pooled_features(pixel_values)
        elif features is None or pixel_values is not None:
            raise ValueError("give either pixel_values or features")
        if features.shape[-1] != self.config.input_dim:
            raise ValueError(f"features are {features.shape[-1]} wide; this head takes {self.config.input_dim}")
        weights = next(self.projector.parameters())
        embeddings = self.projector(features.to(device=weights.device, dtype=weights.dtype))
        if return_dict is False:
            return embeddings, embeddings, features
        return SpatialEmbeddingsOutput(embeddings=embeddings, pooler_output=embeddings, features=features)

    def pooled_features(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) preprocessed pixels -> (B, input_dim) backbone features, pooled as the head was trained on."""
        backbone: Any = self.load_backbone().backbone
        weights = next(backbone.parameters())
        outputs = backbone(pixel_values=pixel_values.to(device=weights.device, dtype=weights.dtype))
        pooled: Tensor | None = None
        if self.config.pooling_type == "pooler_output":
            pooled = getattr(outputs, "pooler_output", None)
        first: Tensor = outputs.last_hidden_state[:, 0]
        return first if pooled is None else pooled

    def load_backbone(self, name_or_path: str | Path | None = None, **kwargs: Any) -> SpatialEmbeddingsModel:
        """Attach the backbone to a head that was published alone; does nothing when there is one already.

        Args:
            name_or_path: a local copy of the backbone; default: the hub id in the configuration, at its revision.
            kwargs: passed on to `AutoModel.from_pretrained`, for example `token` or `dtype`.

        Returns:
            This model, now able to take pixels.

        Raises:
            ValueError: if no local copy is given and the configuration pins no commit, because the head is only valid
                on the exact backbone it was trained on.
        """
        if self.backbone is not None:
            return self
        source = str(name_or_path or self.config.backbone_model_name or "")
        if name_or_path is None or not Path(source).is_dir():
            revision = kwargs.pop("revision", None) or self.config.backbone_revision or ""
            if not _COMMIT.fullmatch(revision):
                raise ValueError(
                    f"backbone {source!r} is pinned to no commit of a hub (revision {revision!r}); "
                    "give load_backbone a local folder of the backbone this head was trained on"
                )
            kwargs["revision"] = revision
        head = next(self.projector.parameters())
        kwargs.setdefault("dtype", head.dtype)
        backbone = AutoModel.from_pretrained(source, **kwargs)
        return self.attach_backbone(backbone.to(head.device))

    def attach_backbone(self, backbone: Any) -> SpatialEmbeddingsModel:
        """Use a backbone that is loaded already (a transformers model), for a head that was published alone.

        Raises:
            ValueError: if its features are of another width than the head takes.
        """
        sizes = getattr(backbone.config, "hidden_sizes", None)
        width = sizes[-1] if sizes else backbone.config.hidden_size
        if width != self.config.input_dim:
            raise ValueError(f"backbone gives features {width} wide; this head takes {self.config.input_dim}")
        self.backbone = backbone.train(self.training)
        # Its weights stay where they came from: saving the model again writes the head alone.
        self._keys_to_ignore_on_save = {f"backbone.{name}" for name in backbone.state_dict()}
        return self

    @torch.inference_mode()
    def check_golden(self, folder: str | Path | None = None, **kwargs: Any) -> dict[str, float]:
        """Recompute the vectors that were shipped with the model and compare.

        Args:
            folder: where `golden.json` and `golden.safetensors` are; default: where the model was loaded from.
            kwargs: passed on to the hub download, for example `revision` or `token`.

        Returns:
            `max_abs_difference` and `min_cosine` over the golden images; from the features instead of the pixels when
            the backbone is not loaded.

        Raises:
            ValueError: if the vectors differ by more than `golden.json` allows.
        """
        from safetensors.torch import load_file

        source = str(folder or self.config._name_or_path or self.name_or_path)
        record = json.loads(Path(cached_file(source, "golden.json", **kwargs)).read_text())
        golden = load_file(cached_file(source, "golden.safetensors", **kwargs))
        training = self.training
        self.eval()
        if self.backbone is None:
            outputs = self(features=golden["features"])
        else:
            outputs = self(pixel_values=golden["pixel_values"])
        self.train(training)
        found, expected = outputs.embeddings.cpu(), golden["embeddings"]
        figures = {
            "max_abs_difference": float((found - expected).abs().max()),
            "min_cosine": float(functional.cosine_similarity(found, expected).min()),
        }
        exact = self.dtype == torch.float32
        allowed = record["tolerance"]["float32" if exact else "reduced_precision"]
        within = figures["min_cosine"] >= allowed["min_cosine"]
        if exact:
            within = within and figures["max_abs_difference"] <= allowed["max_abs_difference"]
        if not within:
            raise ValueError(f"{source}: golden vectors are not reproduced: found {figures}, allowed {allowed}")
        return figures


SpatialEmbeddingsModel.register_for_auto_class("AutoModel")

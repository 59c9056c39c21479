"""Configuration of a published "same building" model.

This file is shipped inside the model folder and runs without spatial_core: it may import nothing but transformers.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

POOLING_TYPES = ("cls_token", "pooler_output")


class SpatialEmbeddingsConfig(PretrainedConfig):  # type: ignore[misc]
    """Backbone architecture, pooling, and the exact shape of the projection head.

    Args:
        backbone_config: configuration of the vision backbone, as an object or as its JSON dict; the backbone is built
            from it, so loading needs no second repository. None only when the head is published alone for a backbone
            whose architecture transformers does not know.
        backbone_model_name: hub id or folder name of the backbone the head was trained on.
        backbone_revision: commit of that hub model, or `sha256:<hex>` of its weights where they came from a folder.
        include_backbone: whether the weights beside this file hold the backbone too, or the head only.
        pooling_type: what stands for an image: `cls_token` (first token of the last hidden state) or `pooler_output`
            (`cls_token` again for a backbone that has none).
        input_dim: width of the pooled features.
        hidden_widths: width of every hidden layer, exactly.
        output_dim: width of the embeddings.
        activation: `gelu`, `relu` or `silu`.
        dropout: dropout probability while training.
        use_residual: add a linear map of the features to the head's output.
        use_layer_norm: LayerNorm after each linear layer but the residual one.
    """

    model_type = "spatial_embeddings"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 - the name and form transformers looks for

    def __init__(
        self,
        *,
        backbone_config: Any = None,
        backbone_model_name: str | None = None,
        backbone_revision: str | None = None,
        include_backbone: bool = True,
        pooling_type: str = "cls_token",
        input_dim: int = 768,
        hidden_widths: list[int] | tuple[int, ...] = (512,),
        output_dim: int = 256,
        activation: str = "gelu",
        dropout: float = 0.1,
        use_residual: bool = True,
        use_layer_norm: bool = True,
        **kwargs: Any,
    ) -> None:
        if pooling_type not in POOLING_TYPES:
            raise ValueError(f"pooling_type is {pooling_type!r}; expected one of {', '.join(POOLING_TYPES)}")
        if isinstance(backbone_config, dict):
            fields = dict(backbone_config)
            backbone_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        self.backbone_config = backbone_config
        self.backbone_model_name = backbone_model_name
        self.backbone_revision = backbone_revision
        self.include_backbone = include_backbone
        self.pooling_type = pooling_type
        self.input_dim = input_dim
        self.hidden_widths = list(hidden_widths)
        self.output_dim = output_dim
        self.activation = activation
        self.dropout = dropout
        self.use_residual = use_residual
        self.use_layer_norm = use_layer_norm
        super().__init__(**kwargs)


SpatialEmbeddingsConfig.register_for_auto_class()

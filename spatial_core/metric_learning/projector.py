"""The projection head: backbone features in, unit "same building" vectors out.

The order of operations and the names in the state dict are those of the earlier pipeline, so its weights load here
unchanged. What differs: the widths of the hidden layers are kept explicitly, because a multiplier recovered from them
and rounded does not always give the same widths again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatial_core.config.sections import TrainingModelSection
from spatial_core.errors import ConfigError, ModelError

Activation = Literal["gelu", "relu", "silu"]
MIN_HIDDEN_WIDTH = 16
_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


def hidden_widths(first: int, layers: int, multiplier: float) -> tuple[int, ...]:
    """Widths of the hidden layers: each is the one before times `multiplier`, rounded, and 16 at least."""
    widths = [first]
    while len(widths) < layers:
        widths.append(max(MIN_HIDDEN_WIDTH, round(widths[-1] * multiplier)))
    return tuple(widths)


@dataclass(frozen=True)
class ProjectorConfig:
    """Architecture of a projection head.

    Args:
        input_dim: width of the backbone's features.
        hidden_widths: width of each hidden layer, first to last; at least one.
        output_dim: width of the embedding.
        activation: after each hidden layer.
        dropout: probability, on hidden layers and on the output layer (not on the residual).
        use_residual: add a linear map of the input to the output.
        use_layer_norm: LayerNorm after each linear layer but the residual.
    """

    input_dim: int
    hidden_widths: tuple[int, ...]
    output_dim: int = 256
    activation: Activation = "gelu"
    dropout: float = 0.1
    use_residual: bool = True
    use_layer_norm: bool = True

    @classmethod
    def from_head(cls, head: TrainingModelSection, data_dim: int) -> Self:
        """The head that `Settings.head` asks for, on features of width `data_dim`.

        Raises:
            ConfigError: if the settings name another input width than the data have.
        """
        if head.input_dim is not None and head.input_dim != data_dim:
            raise ConfigError(
                f"training_model.input_dim is {head.input_dim}, but the training features have {data_dim} dimensions; "
                f"leave input_dim unset to follow the data"
            )
        return cls(
            input_dim=data_dim,
            hidden_widths=hidden_widths(head.hidden_dim, head.num_hidden_layers, head.hidden_dim_multiplier),
            output_dim=head.output_dim,
            activation=head.activation,
            dropout=head.dropout,
            use_residual=head.use_residual,
            use_layer_norm=head.use_layer_norm,
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "hidden_widths": list(self.hidden_widths)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`.

        Raises:
            ModelError: if a field is missing or unknown.
        """
        try:
            return cls(**{**record, "hidden_widths": tuple(record["hidden_widths"])})
        except (KeyError, TypeError) as error:
            raise ModelError(f"not a projector configuration ({error})") from error


class Projector(nn.Module):
    """(B, input_dim) features -> (B, output_dim) vectors of unit length.

    Hidden blocks are Linear, LayerNorm, activation, dropout; the output block is Linear, LayerNorm, dropout; the
    residual is added after it, and the sum is normalised (in fp32, whatever the arithmetic of the layers).
    """

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.hidden_widths

        def norm(width: int) -> nn.Module:
            return nn.LayerNorm(width) if config.use_layer_norm else nn.Identity()

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
        if projected.dtype in {torch.bfloat16, torch.float16}:
            projected = projected.float()
        return F.normalize(projected, dim=-1)

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


@torch.inference_mode()
def project(projector: Projector, features: Tensor, *, batch_rows: int = 8192) -> Tensor:
    """All of `features` (N, input_dim) through the head, as it will be used: no dropout, no gradient.

    The result (N, output_dim) lies on the projector's device; features are moved there block by block, so they may be
    a memory-mapped host tensor of any floating type. The projector's training mode is restored.
    """
    weight = projector.input_layer.weight
    training = projector.training
    vectors = torch.empty(len(features), projector.config.output_dim, device=weight.device)
    projector.eval()
    try:
        for start in range(0, len(features), batch_rows):
            block = features[start : start + batch_rows].to(weight.device, weight.dtype)
            vectors[start : start + batch_rows] = projector(block)
    finally:
        projector.train(training)
    return vectors


def infer_config(
    state_dict: Mapping[str, Tensor], *, activation: Activation = "gelu", dropout: float = 0.1
) -> ProjectorConfig:
    """The architecture that a state dict was saved from.

    Widths, depth, residual and LayerNorm follow from the weights exactly. Activation and dropout leave no trace in
    weights and are taken as given.

    Raises:
        ModelError: if a weight is missing, unknown, or of a shape that does not fit the others.
    """
    try:
        widths = [state_dict["input_layer.weight"].shape[0]]
        while (name := f"hidden_layers.{len(widths) - 1}.weight") in state_dict:
            widths.append(state_dict[name].shape[0])
        config = ProjectorConfig(
            input_dim=state_dict["input_layer.weight"].shape[1],
            hidden_widths=tuple(widths),
            output_dim=state_dict["output_layer.weight"].shape[0],
            activation=activation,
            dropout=dropout,
            use_residual="residual_proj.weight" in state_dict,
            use_layer_norm="input_norm.weight" in state_dict,
        )
    except (KeyError, IndexError, AttributeError) as error:
        raise ModelError(f"not the weights of a projection head: {error} is missing or has the wrong shape") from error
    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in Projector(config).state_dict().items()}
    faults = _differences(expected, {name: tuple(weight.shape) for name, weight in state_dict.items()})
    if faults:
        raise ModelError(f"weights do not form one projection head: {'; '.join(faults[:5])}")
    return config


def build_projector(config: ProjectorConfig, state_dict: Mapping[str, Tensor]) -> Projector:
    """A head in evaluation mode, fp32, on the CPU, with these weights.

    Raises:
        ModelError: if the weights are not those of `config`, or are not finite.
    """
    found = infer_config(state_dict, activation=config.activation, dropout=config.dropout)
    if found != config:
        raise ModelError(f"weights are those of {found}, not of {config}")
    broken = [name for name, weight in state_dict.items() if not bool(torch.isfinite(weight).all())]
    if broken:
        raise ModelError(f"weights that are not finite: {', '.join(broken[:5])}")
    with torch.device("meta"):
        projector = Projector(config)
    projector = projector.to_empty(device="cpu")
    projector.load_state_dict({name: weight.detach().float() for name, weight in state_dict.items()})
    return projector.eval()


def _differences(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> list[str]:
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} is unknown" for name in found if name not in expected]
    faults += [
        f"{name} is {tuple(found[name])}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    return faults

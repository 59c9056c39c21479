"""The head against a plain-loop forward pass, its width rule, and recovering its architecture from weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spatial_core.config.sections import TrainingModelSection
from spatial_core.errors import ConfigError, ModelError
from spatial_core.metric_learning.projector import (
    Projector,
    ProjectorConfig,
    build_projector,
    hidden_widths,
    infer_config,
    project,
)


def plain_forward(state: dict[str, Tensor], config: ProjectorConfig, row: list[float]) -> list[float]:
    """One row through the head with Python floats only."""

    def linear(name: str, values: list[float]) -> list[float]:
        weight, bias = state[f"{name}.weight"].tolist(), state[f"{name}.bias"].tolist()
        return [sum(w * v for w, v in zip(line, values, strict=True)) + b for line, b in zip(weight, bias, strict=True)]

    def norm(name: str, values: list[float]) -> list[float]:
        if not config.use_layer_norm:
            return values
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        scale, shift = state[f"{name}.weight"].tolist(), state[f"{name}.bias"].tolist()
        return [(v - mean) / math.sqrt(variance + 1e-5) * s + b for v, s, b in zip(values, scale, shift, strict=True)]

    def activate(value: float) -> float:
        if config.activation == "relu":
            return max(value, 0.0)
        if config.activation == "silu":
            return value / (1 + math.exp(-value))
        return value * 0.5 * (1 + math.erf(value / math.sqrt(2)))

    hidden = [activate(v) for v in norm("input_norm", linear("input_layer", row))]
    for index in range(len(config.hidden_widths) - 1):
        hidden = [activate(v) for v in norm(f"hidden_norms.{index}", linear(f"hidden_layers.{index}", hidden))]
    out = norm("output_norm", linear("output_layer", hidden))
    if config.use_residual:
        out = [a + b for a, b in zip(out, linear("residual_proj", row), strict=True)]
    length = math.sqrt(sum(v * v for v in out))
    return [v / length for v in out]


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
@pytest.mark.parametrize(("residual", "layer_norm"), [(True, True), (True, False), (False, True), (False, False)])
def test_forward_is_the_specified_order_of_operations(activation: str, residual: bool, layer_norm: bool) -> None:
    torch.manual_seed(3)
    config = ProjectorConfig(7, (6, 5, 4), 3, activation, 0.3, residual, layer_norm)  # type: ignore[arg-type]
    projector = Projector(config).eval()
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.normal_()
    features = torch.randn(4, 7)
    expected = [plain_forward(projector.state_dict(), config, row) for row in features.tolist()]
    assert torch.allclose(projector(features), torch.tensor(expected), atol=2e-6)


def test_the_published_configuration_has_its_known_size() -> None:
    head = TrainingModelSection(hidden_dim=384, num_hidden_layers=3, use_layer_norm=False, output_dim=256)
    assert Projector(ProjectorConfig.from_head(head, 4096)).parameter_count == 3_016_320


@pytest.mark.parametrize(
    ("first", "layers", "multiplier", "expected"),
    [
        (384, 3, 1.0, (384, 384, 384)),
        (512, 3, 0.75, (512, 384, 288)),
        (256, 3, 1.25, (256, 320, 400)),
        (256, 3, 0.333, (256, 85, 28)),
        (20, 4, 0.5, (20, 16, 16, 16)),
        (5, 2, 1.0, (5, 16)),
        (5, 1, 1.0, (5,)),
    ],
)
def test_width_rule(first: int, layers: int, multiplier: float, expected: tuple[int, ...]) -> None:
    assert hidden_widths(first, layers, multiplier) == expected


def test_state_dict_names_are_the_earlier_pipelines() -> None:
    names = set(Projector(ProjectorConfig(8, (6, 5, 4), 3)).state_dict())
    layers = {"input_layer", "hidden_layers.0", "hidden_layers.1", "output_layer", "residual_proj"}
    norms = {"input_norm", "hidden_norms.0", "hidden_norms.1", "output_norm"}
    assert names == {f"{layer}.{kind}" for layer in layers | norms for kind in ("weight", "bias")}
    bare = set(Projector(ProjectorConfig(8, (6, 5), 3, use_residual=False, use_layer_norm=False)).state_dict())
    assert bare == {f"{n}.{k}" for n in ("input_layer", "hidden_layers.0", "output_layer") for k in ("weight", "bias")}


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    ends=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    switches=st.tuples(st.booleans(), st.booleans()),
)
def test_architecture_is_recovered_from_weights_exactly(
    widths: list[int], ends: tuple[int, int], switches: tuple[bool, bool]
) -> None:
    config = ProjectorConfig(ends[0], tuple(widths), ends[1], "silu", 0.2, *switches)
    state = Projector(config).state_dict()
    assert infer_config(state, activation="silu", dropout=0.2) == config
    features = torch.randn(3, ends[0])
    original = Projector(config)
    rebuilt = build_projector(config, original.state_dict())
    assert torch.equal(original.eval()(features), rebuilt(features))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"input_layer.weight": None}, "input_layer.weight"),
        ({"output_norm.weight": None}, "output_norm.weight is missing"),
        ({"extra.weight": torch.zeros(1)}, "extra.weight is unknown"),
        ({"hidden_layers.0.weight": torch.zeros(5, 9)}, "hidden_layers.0.weight is (5, 9), expected (5, 6)"),
        ({"residual_proj.weight": None}, "residual_proj.bias is unknown"),
        ({"input_layer.weight": torch.zeros(6)}, "wrong shape"),
    ],
)
def test_weights_that_are_no_head_are_refused_by_name(change: dict[str, Tensor | None], named: str) -> None:
    state: dict[str, Tensor] = {**Projector(ProjectorConfig(8, (6, 5), 3)).state_dict()}
    for name, value in change.items():
        if value is None:
            del state[name]
        else:
            state[name] = value
    with pytest.raises(ModelError, match=named.replace("(", r"\(").replace(")", r"\)")):
        infer_config(state)


def test_weights_that_are_not_finite_or_of_another_head_are_refused() -> None:
    config = ProjectorConfig(8, (6,), 3)
    state = Projector(config).state_dict()
    with pytest.raises(ModelError, match="not of"):
        build_projector(ProjectorConfig(8, (7,), 3), state)
    state["input_layer.bias"][2] = float("nan")
    with pytest.raises(ModelError, match=r"not finite: input_layer\.bias"):
        build_projector(config, state)


def test_input_width_of_settings_must_be_that_of_the_data() -> None:
    head = TrainingModelSection(input_dim=4096)
    assert ProjectorConfig.from_head(head, 4096).input_dim == 4096
    with pytest.raises(ConfigError, match=r"4096.*have 384 dimensions"):
        ProjectorConfig.from_head(head, 384)


def test_project_is_the_evaluated_head_in_blocks_and_restores_the_mode() -> None:
    projector = Projector(ProjectorConfig(8, (6,), 3, dropout=0.5)).train()
    features = torch.randn(37, 8)
    vectors = project(projector, features.half(), batch_rows=10)
    assert projector.training
    assert torch.allclose(vectors, projector.eval()(features.half().float()), atol=1e-6)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(37), atol=1e-6)


def test_half_precision_layers_still_give_unit_fp32_vectors() -> None:
    projector = Projector(ProjectorConfig(64, (32,), 16)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        vectors = projector(torch.randn(20, 64))
    assert vectors.dtype == torch.float32
    assert torch.allclose(vectors.norm(dim=1), torch.ones(20), atol=1e-6)


def test_config_round_trip_and_unknown_fields() -> None:
    config = ProjectorConfig(8, (6, 5), 3, "relu", 0.0, False, True)
    assert ProjectorConfig.from_json(config.to_json()) == config
    with pytest.raises(ModelError, match="heads"):
        ProjectorConfig.from_json({**config.to_json(), "heads": 2})

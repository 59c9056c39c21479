"""The search space: the earlier pipeline's ranges, ours in their places, and what is refused."""

from __future__ import annotations

import optuna
import pytest

from spatial_core.errors import ConfigError
from spatial_core.metric_learning.best_trial import TUNABLE
from spatial_core.tuning.space import DEFAULT, Choice, Number, describe, space_of, suggest


def test_the_default_space_is_that_of_the_earlier_pipeline() -> None:
    assert describe(DEFAULT) == {
        "learning_rate": {"low": 5e-5, "high": 5e-4, "log": True, "step": None},
        "weight_decay": {"low": 1e-6, "high": 1e-3, "log": True, "step": None},
        "margin": {"low": 0.2, "high": 1.0, "log": False, "step": None},
        "dropout": {"low": 0.0, "high": 0.4, "log": False, "step": None},
        "use_residual": {"values": [True, False]},
        "use_layer_norm": {"values": [True, False]},
        "loss_distance": {"values": ["euclidean", "cosine"]},
        "hidden_dim": {"values": [256, 384, 512, 768]},
        "num_hidden_layers": {"low": 1, "high": 3, "log": False, "step": 1},
        "hidden_dim_multiplier": {"values": [0.75, 1.0, 1.25]},
        "activation": {"values": ["gelu", "silu", "relu"]},
        "batch_size": {"values": [128, 192, 256, 320]},
        "ucb_exploration_constant": {"low": 0.5, "high": 3.5, "log": False, "step": None},
        "ucb_warmup_samples": {"low": 500, "high": 5000, "log": False, "step": 500},
    }
    assert set(DEFAULT) == set(TUNABLE)


def test_ranges_of_the_settings_take_their_places() -> None:
    space = space_of(
        {"learning_rate": (1e-3, 1e-1), "num_hidden_layers": (2,), "hidden_dim": (64, 128), "margin": (0, 1)}
    )
    assert space["learning_rate"] == Number(1e-3, 1e-1, log=True)
    assert space["num_hidden_layers"] == Choice((2,))
    assert space["hidden_dim"] == Choice((64, 128))
    assert space["margin"] == Number(0.0, 1.0)
    assert space_of({"ucb_warmup_samples": (500, 1500)})["ucb_warmup_samples"] == Number(500, 1500, step=500)
    assert space_of({"ucb_warmup_samples": (50, 75)})["ucb_warmup_samples"] == Number(50, 75, step=1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lerning_rate": (1e-3, 1e-1)}, "did you mean learning_rate"),
        ({"retrieval_metric_max_queries": (128, 4096)}, "cannot be compared.*tuning.max_queries"),
        ({"learning_rate": (0.1, 0.01)}, r"expected \[lowest, highest\] above 0"),
        ({"learning_rate": (0.0, 0.01)}, "above 0"),
        ({"learning_rate": (0.1, 0.2, 0.3)}, "expected numbers"),
        ({"num_hidden_layers": (1, 2.5)}, "expected whole numbers"),
        ({"dropout": ("0.1", 0.3)}, "expected numbers"),
        ({"use_residual": (True, True)}, "twice"),
        ({"activation": ()}, "empty"),
    ],
)
def test_what_is_no_range_is_refused(overrides: dict[str, tuple[bool | float | str, ...]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space_of(overrides)


def test_suggestions_lie_in_the_space_and_repeat() -> None:
    def draw(seed: int) -> list[dict[str, object]]:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        return [suggest(DEFAULT, study.ask()) for _ in range(50)]

    drawn = draw(1)
    assert drawn == draw(1) != draw(2)
    assert {trial["activation"] for trial in drawn} == {"gelu", "silu", "relu"}
    for trial in drawn:
        assert 5e-5 <= float(str(trial["learning_rate"])) <= 5e-4
        assert trial["num_hidden_layers"] in {1, 2, 3}
        assert int(str(trial["ucb_warmup_samples"])) % 500 == 0

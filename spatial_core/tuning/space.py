"""The search space: which hyper-parameters are searched, and between which bounds.

The defaults are the earlier pipeline's fifteen, less one: the size of the evaluation set was a hyper-parameter there,
so its trials were measured on different queries and could not be compared. Here it is fixed by `tuning.max_queries` and
only recorded.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spatial_core.errors import ConfigError

if TYPE_CHECKING:
    from optuna.trial import Trial

Value = bool | int | float | str
FIXED = "retrieval_metric_max_queries"


@dataclass(frozen=True)
class Number:
    """A number between two bounds, both included.

    Args:
        log: drawn evenly on a logarithmic scale.
        step: distance of the values; None = any. Whole bounds and steps mean whole numbers.
    """

    low: float
    high: float
    log: bool = False
    step: int | None = None

    def suggest(self, name: str, trial: Trial) -> Value:
        if self.step is not None:
            return trial.suggest_int(name, int(self.low), int(self.high), step=self.step)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def within(self, name: str, values: Sequence[Value]) -> Number | Choice:
        """The same kind of number between other bounds.

        Raises:
            ConfigError: if these are no bounds.
        """
        kind = int if self.step is not None else float
        numbers = [value for value in values if not isinstance(value, bool | str) and kind(value) == value]
        if len(numbers) != len(values) or len(values) > 2:
            what = "whole numbers" if kind is int else "numbers"
            raise ConfigError(f"tuning.space.{name} is {list(values)}; expected {what} [lowest, highest], or one value")
        if len(numbers) == 1:
            return Choice((kind(numbers[0]),))
        low, high = float(numbers[0]), float(numbers[1])
        if low >= high or (self.log and low <= 0):
            above = " above 0" if self.log else ""
            raise ConfigError(f"tuning.space.{name} is {list(values)}; expected [lowest, highest]{above}")
        fits = self.step is not None and (high - low) % self.step == 0
        return Number(low, high, self.log, self.step if fits or self.step is None else 1)


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Value, ...]

    def suggest(self, name: str, trial: Trial) -> Value:
        chosen = trial.suggest_categorical(name, self.values)
        assert chosen is not None  # noqa: S101 - none of the values is
        return chosen

    def within(self, name: str, values: Sequence[Value]) -> Choice:
        """Other values; whether they are acceptable the settings decide when a trial takes them over."""
        if len(set(values)) != len(values):
            raise ConfigError(f"tuning.space.{name} is {list(values)}; a value occurs twice")
        return Choice(tuple(values))


Space = Mapping[str, Number | Choice]

DEFAULT: Space = {
    "learning_rate": Number(5e-5, 5e-4, log=True),
    "weight_decay": Number(1e-6, 1e-3, log=True),
    "margin": Number(0.2, 1.0),
    "dropout": Number(0.0, 0.4),
    "use_residual": Choice((True, False)),
    "use_layer_norm": Choice((True, False)),
    "loss_distance": Choice(("euclidean", "cosine")),
    "hidden_dim": Choice((256, 384, 512, 768)),
    "num_hidden_layers": Number(1, 3, step=1),
    "hidden_dim_multiplier": Choice((0.75, 1.0, 1.25)),
    "activation": Choice(("gelu", "silu", "relu")),
    "batch_size": Choice((128, 192, 256, 320)),
    "ucb_exploration_constant": Number(0.5, 3.5),
    "ucb_warmup_samples": Number(500, 5000, step=500),
}


def space_of(overrides: Mapping[str, Sequence[Value]]) -> Space:
    """The default space with the ranges of `tuning.space` in their places.

    Raises:
        ConfigError: naming the parameter that does not exist, or whose range is none.
    """
    for name, values in overrides.items():
        if name == FIXED:
            raise ConfigError(
                f"tuning.space.{name}: trials measured on different queries cannot be compared; "
                f"tuning.max_queries sets their number for all trials"
            )
        if name not in DEFAULT:
            near = difflib.get_close_matches(name, DEFAULT, n=1, cutoff=0.0)[0]
            raise ConfigError(f"tuning.space.{name}: no such hyper-parameter; did you mean {near}?")
        if not values:
            raise ConfigError(f"tuning.space.{name} is empty")
    return {
        name: found.within(name, overrides[name]) if name in overrides else found for name, found in DEFAULT.items()
    }


def suggest(space: Space, trial: Trial) -> dict[str, Value]:
    """Draw every hyper-parameter of a trial, always in the same order."""
    return {name: found.suggest(name, trial) for name, found in space.items()}


def describe(space: Space) -> dict[str, Any]:
    """The space as JSON: its share of a study's identity."""
    return {
        name: {"values": list(found.values)}
        if isinstance(found, Choice)
        else {"low": found.low, "high": found.high, "log": found.log, "step": found.step}
        for name, found in space.items()
    }

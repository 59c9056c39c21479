"""What differs from one kind of backbone to the next, and the table of all kinds.

A new kind is one file in `spatial_core/backbones/families/` with a `FAMILY`; nothing else changes.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from spatial_core.backbones import families
from spatial_core.errors import ModelError

PoolingType = str
Pool = Callable[[Any, PoolingType], torch.Tensor]


def pool_tokens(outputs: Any, pooling_type: PoolingType) -> torch.Tensor:
    """(B, D) features of a transformers output.

    `cls_token` is `last_hidden_state[:, 0]`; `pooler_output` is the field of that name, or the CLS token for a model
    that has none.
    """
    if pooling_type == "pooler_output":
        pooled: torch.Tensor | None = getattr(outputs, "pooler_output", None)
        if pooled is not None:
            return pooled
    elif pooling_type != "cls_token":
        raise ModelError(f"pooling_type {pooling_type!r} is not known; there are cls_token and pooler_output")
    cls_token: torch.Tensor = outputs.last_hidden_state[:, 0]
    return cls_token


def width(config: Any) -> int:
    """Feature width D as a model's configuration states it."""
    sizes = getattr(config, "hidden_sizes", None)
    return int(sizes[-1] if sizes else config.hidden_size)


@dataclass(frozen=True)
class Demo:
    """A small model of this kind, built from its configuration with seeded weights; see `seeded`.

    Args:
        model_type: the transformers `model_type`.
        config: arguments of its configuration class.
        preprocessor: its `preprocessor_config.json`.
    """

    model_type: str
    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One kind of backbone.

    Args:
        name: short name, recorded with the features.
        model_types: the `model_type` values of transformers configurations that belong to it.
        license: SPDX identifier of the published weights, or `other`.
        license_name: the licence's own name, for model cards.
        license_url: where its text is published.
        demos: seeded models by name, for tests and the demonstration.
        pool: turns a model's output into (B, D).
    """

    name: str
    model_types: tuple[str, ...]
    license: str
    license_name: str
    license_url: str
    demos: Mapping[str, Demo] = field(default_factory=dict)
    pool: Pool = pool_tokens


def known_families() -> list[Family]:
    """Every family, in the order of their file names."""
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    return [importlib.import_module(f"{families.__name__}.{name}").FAMILY for name in names]


def family_of(model_type: str, where: str) -> Family:
    """The family of a configuration's `model_type`.

    Raises:
        ModelError: naming the families there are.
    """
    for family in known_families():
        if model_type in family.model_types:
            return family
    known = ", ".join(kind for family in known_families() for kind in family.model_types)
    raise ModelError(f"{where}: model_type {model_type!r} is not a known backbone; known are {known}")


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers draws bars on stderr while it reads and writes weights; job logs are better without."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()

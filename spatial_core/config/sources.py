"""What the settings are read from: a TOML file, environment variables, overrides; later ones on top of earlier ones."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spatial_core.config.earlier import settle
from spatial_core.errors import ConfigError

ENV_PREFIX = "SPATIAL_"


@dataclass
class Given:
    """What was given so far, every key at home, and from where.

    Args:
        file: where what has no origin of its own comes from.
        native: section -> the keys it has.
        tree: section -> key -> value; later sources have replaced earlier ones.
        origins: (section, key) -> the variable or option it comes from.
        moved: (section, key) -> the place it was given at, where that was another.
        notes: what became of keys of other sections.
    """

    file: str
    native: Mapping[str, Collection[str]]
    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[tuple[str, str], str] = field(default_factory=dict)
    moved: dict[tuple[str, str], str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, source: Mapping[str, Any], origin: str = "") -> None:
        """Put a source on top."""
        settled = settle(source, self.native)
        self.notes += settled.notes
        for section, keys in settled.tree.items():
            if not (isinstance(keys, dict) and isinstance(self.tree.setdefault(section, {}), dict)):
                self.tree[section] = keys
                continue
            for key, value in keys.items():
                _merge(self.tree[section], key, value)
                self.origins.pop((section, key), None)
                self.moved.pop((section, key), None)
                if origin:
                    self.origins[section, key] = origin
        self.moved |= settled.moved

    def add_file(self, path: Path) -> None:
        """Put a TOML file on top.

        Raises:
            ConfigError: if it cannot be read.
        """
        self.add(_read_toml(path))

    def add_environment(self, environ: Mapping[str, str]) -> None:
        """Put variables `SPATIAL_<SECTION>__<KEY>` on top."""
        for name, text in sorted(environ.items()):
            if name.startswith(ENV_PREFIX) and "__" in name:
                place = name[len(ENV_PREFIX) :].lower().split("__")
                self.add(_nested(place, _parse_value(text)), name)

    def add_override(self, text: str) -> None:
        """Put `section.key=value` on top; the value is TOML, or plain text when it is not.

        Raises:
            ConfigError: if the text has another form.
        """
        name, equals, value = text.partition("=")
        place = name.strip().split(".")
        if not (equals and len(place) > 1 and all(place)):
            raise ConfigError(f"--set {text}: expected section.key=value")
        self.add(_nested(place, _parse_value(value.strip())), f"--set {'.'.join(place)}")

    def origin_of(self, places: Collection[tuple[str, ...]]) -> tuple[str, str]:
        """(where the settings at some places come from, in what other section they were given, or "").

        Args:
            places: (section, key), or (section,) for all of it.
        """
        named = [text for place, text in self.origins.items() if place in places or place[:1] in places]
        elsewhere = [text for place, text in self.moved.items() if place in places and place not in self.origins]
        return ", ".join(named) or self.file, ", ".join(elsewhere)


def _read_toml(path: Path) -> dict[str, Any]:
    if path.suffix != ".toml":
        raise ConfigError(f"{path}: settings are read from a .toml file")
    try:
        with path.open("rb") as handle:
            return tomllib.load(handle)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from error


def _nested(place: list[str], value: Any) -> dict[str, Any]:
    """A tree of one value: of a section, or of a table inside it (["compute", "resources", "merged_splits", "mem"])."""
    for name in reversed(place):
        value = {name: value}
    tree: dict[str, Any] = value
    return tree


def _merge(table: dict[str, Any], key: str, value: Any) -> None:
    """Set a key; what a table of that name holds besides stays."""
    inner = table.get(key)
    if isinstance(value, dict) and isinstance(inner, dict):
        for name, item in value.items():
            _merge(inner, name, item)
    else:
        table[key] = value


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text

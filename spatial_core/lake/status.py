"""What exists, what is stale and what is missing, artifact by artifact. Reads manifests only, never data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from spatial_core.config.settings import Settings
from spatial_core.errors import ConfigError
from spatial_core.jobs.registry import STAGES
from spatial_core.lake.catalogue import CATALOGUE, ArtifactKind, known_keys
from spatial_core.storage.provenance import read_manifest

State = Literal["made", "touched", "stale", "missing", "on demand", "gone"]


@dataclass(frozen=True)
class ArtifactStatus:
    """State of one artifact.

    `made`: finished, from the inputs and settings of now. `touched`: finished, but its raw file was written again in
    the same size, and only the stage itself compares the content. `stale`: finished, but `why` says what has changed
    since. `missing`: not made. `on demand`: not made, and not missed, as it is made only when asked for. `gone`: a raw
    input that was there once; what was made from it stays.
    """

    asset: str
    partition: str
    state: State
    why: str
    rows: int | None
    bytes: int | None
    seconds: float | None


def lake_status(settings: Settings) -> list[ArtifactStatus]:
    """The state of every artifact of the lake, in the order of the chain, partitions sorted."""
    walk = _Walk(settings)
    return [
        walk.visit(kind, key)
        for kind in CATALOGUE.values()
        for key in ([""] if kind.partition is None else known_keys(settings, kind.partition))
    ]


class _Walk:
    """Visits artifacts upstream first, remembering what each one is now."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.digests: dict[tuple[str, str], str] = {}
        self.stale: set[tuple[str, str]] = set()

    def visit(self, kind: ArtifactKind, key: str) -> ArtifactStatus:
        path = kind.path(self.settings.locations, key)
        if not kind.stage:
            if path.exists():
                return ArtifactStatus(kind.name, key, "made", "", None, path.stat().st_size, None)
            why = f"{path} was removed; what was made from it stays"
            return ArtifactStatus(kind.name, key, "gone", why, None, None, None)
        manifest = read_manifest(path)
        if manifest is None or not path.exists():
            state: State = "on demand" if kind.on_demand else "missing"
            return ArtifactStatus(kind.name, key, state, "", None, None, None)
        self.digests[kind.name, key] = manifest["sha256"]
        judged, why = self._judge(kind, key, manifest)
        if judged == "stale":
            self.stale.add((kind.name, key))
        report = manifest["report"]
        return ArtifactStatus(kind.name, key, judged, why, report["rows"], manifest["bytes"], report["seconds"])

    def _judge(self, kind: ArtifactKind, key: str, manifest: dict[str, Any]) -> tuple[State, str]:
        if why := self._outdated(kind, key, manifest):
            return "stale", why
        return self._source_changed(kind, key, manifest)

    def _outdated(self, kind: ArtifactKind, key: str, manifest: dict[str, Any]) -> str:
        provenance = manifest["provenance"]
        if provenance["code_version"] != STAGES[kind.stage].code_version:
            return f"made by version {provenance['code_version']} of the stage"
        # What a tuning study decided is not the settings' to change; another study is another input.
        decided = (manifest["report"]["details"].get("study") or {}) if "tuning_study" in provenance["inputs"] else {}
        changed = [
            name
            for name, value in provenance["config"].items()
            if name not in decided.get("settings", {}) and self._setting(name) != value
        ]
        if changed:
            return f"settings changed: {', '.join(sorted(changed))}"
        used = set(provenance["inputs"].values())
        for (asset, partition), digest in self.digests.items():
            unrelated = kind.partition is not None and partition not in {"", key}
            if asset not in kind.upstream or unrelated:
                continue
            name = f"{asset} {partition}".rstrip()
            if (asset, partition) in self.stale:
                return f"{name} is stale"
            if digest not in used:
                return f"{name} changed or is new"
        return ""

    def _source_changed(self, kind: ArtifactKind, key: str, manifest: dict[str, Any]) -> tuple[State, str]:
        """A raw input written since: by size and mtime, as reading it would take long."""
        for upstream in kind.upstream:
            path = CATALOGUE[upstream].path(self.settings.locations, key)
            details = manifest["report"]["details"]
            recorded = details.get("tar") or details.get("drop")
            if CATALOGUE[upstream].stage or not recorded or not path.exists():
                continue
            stat = path.stat()
            if stat.st_size != recorded["bytes"]:
                return "stale", f"{path.name} was replaced"
            if stat.st_mtime_ns != recorded["mtime_ns"]:
                return "touched", f"{path.name} was written again in the same size; content not compared yet"
        return "made", ""

    def _setting(self, dotted: str) -> Any:
        try:
            return self.settings.pick(dotted)[dotted]
        except KeyError as error:
            raise ConfigError(f"a manifest names the setting {dotted}, which does not exist any more") from error

"""Where the earlier pipeline let its settings stand, and where they stand here.

It read its file job by job: the sections of a job were merged, later ones winning, so a key of the job was good in any
of them. Here a key has one section. A key that stands in another section of its job is moved home, so that an existing
file has the effect it had; what has no effect here is taken out and reported.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

Tree = dict[str, Any]

_HEAD: Final = (
    "input_dim hidden_dim num_hidden_layers hidden_dim_multiplier output_dim activation dropout use_residual "
    "use_layer_norm"
)
_TRAINING: Final = (
    "batch_size num_epochs learning_rate weight_decay margin loss_distance ucb_exploration_constant ucb_warmup_samples "
    "save_every_n_epochs validate_every_n_epochs resume_from_checkpoint early_stopping_patience retrieval_metric_top_k "
    "retrieval_metric_max_queries retrieval_metric_per_building_limit sample_fraction sample_buildings "
    "val_sample_fraction val_sample_buildings best_training_trial_name_pattern best_training_metric_name"
)
_TRACKING: Final = "log_every_n_batches wandb_enabled wandb_project wandb_run_name wandb_mode"
_TRAINING_FILES: Final = "train_parquet_path val_parquet_path difficulty_metadata_path checkpoint_dir log_file"
_SEED_REASON: Final = "global.seed serves every stage but training"


@dataclass(frozen=True)
class Job:
    """A job of the earlier pipeline.

    Args:
        sections: those merged for it, later ones win.
        homes: our sections of its keys -> the keys, separated by spaces. A key with two homes may stand in either, and
            the later one wins here too.
    """

    sections: tuple[str, ...]
    homes: Mapping[str, str]

    def homes_of(self) -> dict[str, list[str]]:
        """Key -> its homes, in the order of the sections."""
        found: dict[str, list[str]] = {}
        for section, keys in self.homes.items():
            for key in keys.split():
                found.setdefault(key, []).append(section)
        return found


JOBS: Final = {
    "process_tar": Job(("paths",), {"paths": "tar_file intermediates_dir temp_dir log_file"}),
    "merge_and_split": Job(
        ("paths", "data"),
        {
            "paths": "intermediates_dir embeddings_dir merged_dir log_file",
            "data": "train_ratio val_ratio test_ratio batch_size",
        },
    ),
    "generate_embeddings": Job(
        ("paths", "embedding_model"),
        {
            "paths": "intermediates_dir embeddings_dir temp_dir log_file",
            "embedding_model": "model_name batch_size pooling_type",
        },
    ),
    "compute_fingerprints": Job(
        ("paths", "fingerprints"),
        {"paths": "intermediates_dir fingerprints_dir temp_dir log_file", "fingerprints": "image_size"},
    ),
    "triplet_training": Job(
        ("paths", "training_model", "training", "logging"),
        {
            "paths": _TRAINING_FILES,
            "training_model": _HEAD,
            "training": f"{_HEAD} {_TRAINING}",
            "logging": _TRACKING,
        },
    ),
    "difficulty_metadata": Job(
        ("paths", "data", "infrastructure"),
        {
            "paths": "fingerprints_dir difficulty_metadata_path log_file",
            "data": "neighbors k0_for_local_scale sample_fraction_for_bands pca_components",
            "infrastructure": "distance_dtype batch_size row_group_size",
        },
    ),
}


@dataclass
class Settled:
    """A tree in which every key stands at home.

    Args:
        tree: section -> key -> value.
        moved: (section, key) it stands at now -> where it was given, as `section.key`.
        notes: one line for each key that was moved or taken out.
    """

    tree: Tree
    moved: dict[tuple[str, str], str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def settle(given: Mapping[str, Any], native: Mapping[str, Collection[str]]) -> Settled:
    """Move every key of a tree to the section it has here.

    Args:
        given: section -> key -> value, from one source.
        native: section -> the keys it has here. Keys that belong to no job stay where they are, for somebody to refuse.
    """
    settled = Settled({name: dict(keys) if isinstance(keys, Mapping) else keys for name, keys in given.items()})
    sections = {name: dict(keys) for name, keys in given.items() if isinstance(keys, Mapping)}
    for job in JOBS.values():
        for key, homes in job.homes_of().items():
            givers = [name for name in job.sections if key in sections.get(name, {})]
            aliens = [name for name in givers if key not in native[name]]
            for name in aliens:
                settled.tree[name].pop(key, None)
            if not aliens or givers[-1] not in aliens:
                settled.notes += [f"{name}.{key} gives way to {givers[-1]}.{key}" for name in aliens]
                continue
            winner = aliens[-1]
            after = job.sections.index(winner) > job.sections.index(homes[-1])
            _move(settled, f"{winner}.{key}", (homes[-1] if after else homes[0], key), sections[winner][key])
            settled.notes += [f"{name}.{key} gives way to {winner}.{key}" for name in aliens[:-1]]
    _settle_seeds(settled, sections, native)
    settled.notes = list(dict.fromkeys(settled.notes))
    return settled


def share_batch_size(tree: Tree) -> None:
    """Let [data] batch_size bound the neighbour search too where [infrastructure] has none: both were of that job."""
    data, infrastructure = tree.get("data"), tree.setdefault("infrastructure", {})
    if isinstance(data, dict) and isinstance(infrastructure, dict) and "batch_size" in data:
        infrastructure.setdefault("batch_size", data["batch_size"])


def _settle_seeds(settled: Settled, sections: Mapping[str, Tree], native: Mapping[str, Collection[str]]) -> None:
    """Every job had a seed, which its sections could replace."""
    givers = [name for job in JOBS.values() for name in job.sections if "seed" in sections.get(name, {})]
    for name in dict.fromkeys(givers):
        if "seed" in native[name]:
            continue
        value = settled.tree[name].pop("seed")
        if name == "paths":
            _move(settled, "paths.seed", ("global", "seed"), value)
        elif name == "logging" or (name == "training_model" and "seed" not in sections.get("training", {})):
            _move(settled, f"{name}.seed", ("training", "seed"), value)
        else:
            settled.notes.append(f"{name}.seed is not used: {_SEED_REASON}")


def _move(settled: Settled, source: str, target: tuple[str, str], value: Any) -> None:
    section, key = target
    home = settled.tree.setdefault(section, {})
    if not isinstance(home, dict):  # refused for what it is
        return
    before = settled.moved.get(target)
    instead = before or (f"{section}.{key}" if key in home else "")
    home[key] = value
    settled.moved[target] = source
    settled.notes.append(
        f"{source} is read as {section}.{key}" + (f", and wins over {instead}" if instead not in {"", source} else "")
    )

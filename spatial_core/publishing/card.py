"""The model card: what the model is, what it was measured to do, where it comes from, and what it is not for.

Every number in it comes from the evaluation report or the checkpoint; where there is none the card says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]

from spatial_core.errors import ArtifactError, InputError
from spatial_core.publishing.golden import FLOAT32, REDUCED_PRECISION
from spatial_core.publishing.licence import Licence
from spatial_core.storage.provenance import artifact_digest

METRICS_FILE = "metrics.json"
_PROJECTOR = "projector"
_METHOD_TEXT = {
    "projector": "this model",
    "backbone": "raw backbone features",
    "pca": "backbone features, PCA to the same width",
    "random": "random vectors",
}
_RECALLS = ("recall@1", "recall@5", "recall@10", "recall@100")
_MEASURES = (*_RECALLS, "mAP", "MRR")


@dataclass(frozen=True)
class Evaluation:
    """What the evaluation stage measured on this checkpoint.

    Args:
        headline: one row a split and method, with recall@k and its interval; empty when it was not evaluated.
        sha256: digest of the report folder.
    """

    headline: tuple[Mapping[str, Any], ...] = ()
    sha256: str = ""


@dataclass(frozen=True)
class CardFacts:
    """Everything the card states.

    Args:
        name: name of the model.
        repo_id: hub repository the card is for, if any.
        backbone: id of the backbone, as in the configuration.
        revision: its commit or digest.
        on_hub: whether `backbone` is a hub id that `base_model` may name.
        seeded: whether the backbone's weights are seeded random numbers.
        include_backbone: whether its weights are in the folder.
        pooling_type: what stands for an image.
        preprocessing: the pixel preprocessing in one line.
        input_dim: width of the pooled features.
        hidden_widths: of the head.
        output_dim: width of the embeddings.
        parameters: of the head.
        epoch: epochs the head was trained for when its weights were taken.
        checkpoint_sha256: digest of its weights file.
        config_digest: digest of the settings of the training run; empty for an earlier pipeline's checkpoint.
        inputs: training inputs by name, with their SHA-256.
        validation: metrics recorded in the checkpoint.
        licence: of the folder.
        evaluation: figures on held-out buildings.
    """

    name: str
    repo_id: str | None
    backbone: str
    revision: str
    on_hub: bool
    seeded: bool
    include_backbone: bool
    pooling_type: str
    preprocessing: str
    input_dim: int
    hidden_widths: Sequence[int]
    output_dim: int
    parameters: int
    epoch: int
    checkpoint_sha256: str
    config_digest: str
    inputs: Mapping[str, str]
    validation: Mapping[str, float]
    licence: Licence
    evaluation: Evaluation


def read_evaluation(report_dir: Path | None, weights_sha256: str) -> Evaluation:
    """Figures of an evaluation report; empty when none is named.

    Args:
        report_dir: folder of the evaluation stage, if there is one.
        weights_sha256: of the checkpoint the card is for.

    Raises:
        InputError: if the folder, or the metrics in it, are not there.
        ArtifactError: if the metrics cannot be read, or are those of another checkpoint.
        DigestMismatch: if the report changed after it was made.
    """
    if report_dir is None:
        return Evaluation()
    path = report_dir / METRICS_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file; the report for the model card is the folder that `evaluate` wrote")
    try:
        record = json.loads(path.read_bytes())
        rows = tuple(dict(row) for row in record["headline"] if {"split", "method"} <= set(row))
        measured = record["checkpoint"]["weights_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not a report of stage 'evaluate' ({error!r}); run it again") from error
    if measured != weights_sha256:
        raise ArtifactError(
            f"{path}: measured another checkpoint (sha256 {str(measured)[:12]}, not {weights_sha256[:12]}); "
            "run stage 'evaluate' on this one"
        )
    return Evaluation(rows, artifact_digest(report_dir))


def render_card(facts: CardFacts) -> str:
    """README.md of the model folder: YAML front matter and Markdown."""
    front = yaml_dump(_front_matter(facts), sort_keys=False)
    sections = [
        f"---\n{front}---\n\n# {facts.name}",
        _summary(facts),
        "## Use\n\n" + _usage(facts),
        "## Evaluation\n\n" + _evaluation(facts),
        "## Training data and provenance\n\n" + _provenance(facts),
        "## Intended use and limits\n\n" + _limits(),
        "## Licence and attribution\n\n" + _attribution(facts),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(facts: CardFacts) -> dict[str, Any]:
    licence = facts.licence
    front: dict[str, Any] = {"license": licence.identifier}
    if licence.name is not None:
        front |= {"license_name": licence.name, "license_link": licence.link}
    front |= {"library_name": "transformers", "pipeline_tag": "image-feature-extraction"}
    if facts.on_hub:
        front["base_model"] = facts.backbone
    front["tags"] = ["spatial-embeddings", "building-recognition", "street-view", "metric-learning", "custom_code"]
    results = [_model_index_entry(row) for row in facts.evaluation.headline if row["method"] == _PROJECTOR]
    results = [entry for entry in results if entry["metrics"]]
    if results:
        front["model-index"] = [{"name": facts.name, "results": results}]
    return front


def _model_index_entry(row: Mapping[str, Any]) -> dict[str, Any]:
    split = str(row["split"])
    return {
        "task": {"type": "image-feature-extraction", "name": "Same-building retrieval"},
        "dataset": {"type": "street-view-buildings", "name": f"held-out buildings ({split})", "split": split},
        "metrics": [
            {"type": name.replace("@", "_at_"), "name": name, "value": row[name]}
            for name in _MEASURES
            if row.get(name) is not None
        ],
    }


def _summary(facts: CardFacts) -> str:
    holds = "backbone and projection head" if facts.include_backbone else "the projection head only"
    text = (
        f"Turns a street-level picture of a building into a vector of {facts.output_dim} numbers and unit length. "
        "Pictures of one building, from other viewpoints and in other light, are meant to lie close together: compare "
        f"vectors by their dot product. The folder holds {holds}."
    )
    if facts.seeded:
        text += (
            "\n\n> The backbone's weights are **seeded random numbers**, not a pretrained model. This folder shows how "
            "the pipeline works; it is not fit for real pictures."
        )
    layers = " -> ".join(str(width) for width in (facts.input_dim, *facts.hidden_widths, facts.output_dim))
    rows = [
        ("backbone", f"`{facts.backbone}` at `{facts.revision}`"),
        ("pooling", f"`{facts.pooling_type}`"),
        ("head", f"{layers}, {facts.parameters:,} parameters"),
        ("pixels", facts.preprocessing),
    ]
    return text + "\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _usage(facts: CardFacts) -> str:
    source = facts.repo_id or "."
    where = "" if facts.repo_id else "  # this folder"
    shipped = "golden/00.jpg"
    lines = [
        "```python",
        "from PIL import Image",
        "from transformers import AutoImageProcessor, AutoModel",
        "",
        f'source = "{source}"{where}',
        "model = AutoModel.from_pretrained(source, trust_remote_code=True).eval()",
        "processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=True)",
    ]
    if not facts.include_backbone:
        argument = "" if facts.on_hub else '"path/to/the/backbone"'
        lines.append(f"model.load_backbone({argument})  # the backbone the head was trained on, at its revision")
    lines += [
        f'pixels = processor(images=[Image.open("{shipped}")], return_tensors="pt")',
        f"vectors = model(**pixels).embeddings  # (1, {facts.output_dim}), unit length",
        "print(model.check_golden())  # recomputes the shipped vectors, raises if they differ",
        "```",
    ]
    return "\n".join(lines) + (
        '\n\nWorks with transformers 4.57 and 5, and through `pipeline("image-feature-extraction", model=source, '
        "trust_remote_code=True)`. torchvision is not needed. `golden.safetensors` holds the vectors of the pictures "
        f"in `golden/`; recomputed in float32 they differ by at most {FLOAT32.max_abs_difference:g}, and in half "
        f"precision their cosine stays above {REDUCED_PRECISION.min_cosine}. `MANIFEST.json` lists the SHA-256 "
        "of every file."
    )


def _evaluation(facts: CardFacts) -> str:
    if not facts.evaluation.headline:
        text = "This model has **not been evaluated**: no retrieval report was given when it was published."
        if facts.validation:
            figures = ", ".join(f"{name} {value:.4f}" for name, value in sorted(facts.validation.items()))
            text += f" During training, on the validation split: {figures}."
        return text
    names = [name for name in _MEASURES if any(row.get(name) is not None for row in facts.evaluation.headline)]
    lines = [
        "Same-building retrieval on buildings held out from training: share of query images that have another image of "
        "their building among the k nearest.",
        "",
        "| split | vectors | queries | " + " | ".join(names) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for row in facts.evaluation.headline:
        method = str(row["method"])
        cells = [str(row["split"]), _METHOD_TEXT.get(method, method), str(row.get("queries", ""))]
        lines.append("| " + " | ".join(cells + [_figure(row, name) for name in names]) + " |")
    lines.append("\nIn brackets: confidence interval, bootstrapped over buildings.")
    return "\n".join(lines)


def _figure(row: Mapping[str, Any], name: str) -> str:
    value, interval = row.get(name), row.get(f"{name}_ci")
    if value is None:
        return "-"
    return f"{value:.3f}" if not interval else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _provenance(facts: CardFacts) -> str:
    rows = [("checkpoint", facts.checkpoint_sha256), *sorted(facts.inputs.items())]
    if facts.config_digest:
        rows.append(("settings", facts.config_digest))
    lines = [
        "The head was trained with difficulty-guided triplets on pictures of facade points that came in the layout of "
        "the 3D Street View data set, with the backbone frozen. No building of the validation and test splits was "
        f"trained on. The weights were taken after epoch {facts.epoch}.",
        "",
        "| what it was made from | SHA-256 |",
        "|---|---|",
        *(f"| {name} | `{digest}` |" for name, digest in rows if digest),
    ]
    return "\n".join(lines)


def _limits() -> str:
    return (
        "Meant for finding pictures of the same building, removing duplicates, and as features for models of buildings "
        "seen from the street. Not meant for identifying people or vehicles, for judging who lives in a building, or "
        "as the only evidence of where a picture was taken.\n\n"
        "- It sees the picture alone: no position, no map.\n"
        "- A training label is a facade point. Two points of one physical building count as different buildings.\n"
        "- Look-alike buildings (terraces, blocks of one developer) are the hardest; expect confusions among them.\n"
        "- Aerial or indoor pictures and close-ups of details are outside what it was trained on.\n"
        "- Results in places unlike the training cities are unknown until measured there."
    )


def _attribution(facts: CardFacts) -> str:
    name = facts.licence.identifier if facts.licence.name is None else facts.licence.name
    return (
        f"Licence: {name}; the text is in `LICENSE`.\n\n"
        "- 3D Street View data set: Zamir, Wekel, Agrawal, Wei, Malik, Savarese, *Generic 3D Representation via Pose "
        "Estimation and Matching*, ECCV 2016.\n"
        "- DINOv2: Oquab et al., *DINOv2: Learning Robust Visual Features without Supervision*, 2023. "
        "DINOv3: Simeoni et al., *DINOv3*, 2025."
    )

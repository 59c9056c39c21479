"""The Arrow schema of every artifact: the contract between stages, and with people who used the earlier pipeline.

The first columns of each schema, their names, types and order, are the earlier pipeline's; ours come after them. Each
field carries its meaning in its metadata under `description`, which Dagster shows beside the column.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from spatial_core.errors import ArtifactError
from spatial_core.storage.parquet import vector_type


def column(name: str, kind: pa.DataType, description: str, *, nullable: bool = False) -> pa.Field:
    """A field with its meaning attached."""
    return pa.field(name, kind, nullable=nullable, metadata={"description": description})


IDENTITY: tuple[pa.Field, ...] = (
    column("dataset_id", pa.int64(), "data set (tar) number, from the tar's file name"),
    column("target_id", pa.int64(), "facade point, unique within its data set"),
    column("patch_id", pa.int64(), "image, unique within its data set"),
    column("street_view_id", pa.int64(), "panorama the image was cut from"),
    column("target_lat", pa.float64(), "latitude of the facade point, degrees WGS84"),
    column("target_lon", pa.float64(), "longitude of the facade point, degrees WGS84"),
    column("building_id", pa.string(), "zero-padded data set number + '_' + target id"),
    column("streetview_image_id", pa.string(), "zero-padded data set number + '_' + patch id"),
)
SOURCE: tuple[pa.Field, ...] = (
    column("image_path", pa.string(), "member name of the image inside the tar"),
    column("tar_file", pa.string(), "file name of the tar"),
)
GEOMETRY: tuple[pa.Field, ...] = (
    column("target_height_m", pa.float64(), "height of the facade point, metres"),
    column("normal_x", pa.float64(), "facade normal, unit vector, WebMercator east"),
    column("normal_y", pa.float64(), "facade normal, unit vector, WebMercator north"),
    column("normal_z", pa.float64(), "facade normal, unit vector, up"),
    column("street_view_lat", pa.float64(), "camera latitude, degrees WGS84"),
    column("street_view_lon", pa.float64(), "camera longitude, degrees WGS84"),
    column("street_view_height_m", pa.float64(), "camera height, metres"),
    column("distance_m", pa.float64(), "camera to facade point, metres"),
    column("heading_deg", pa.float64(), "camera heading, degrees, 0 = north, clockwise"),
    column("pitch_deg", pa.float64(), "camera pitch, degrees, 0 = horizon, -90 = ground"),
    column("roll_deg", pa.float64(), "camera roll, degrees"),
    column("sift_flow_energy", pa.float64(), "alignment energy, aligned release only", nullable=True),
    column("alignment_inlier_ratio", pa.float64(), "alignment inlier ratio, aligned release only", nullable=True),
    column("alignment_similarity", pa.float64(), "alignment similarity, aligned release only", nullable=True),
    column("alignment_distortion", pa.float64(), "alignment distortion, aligned release only", nullable=True),
)
IMAGE: tuple[pa.Field, ...] = (
    column("image_offset", pa.int64(), "byte offset of the image's data in the tar"),
    column("image_bytes", pa.int64(), "length of the image's data in the tar, bytes"),
    column("image_width", pa.int32(), "pixels"),
    column("image_height", pa.int32(), "pixels"),
    column("image_sha256", pa.string(), "hex SHA-256 of the image's bytes"),
)

INTERMEDIATES = pa.schema([*IDENTITY, *SOURCE, *GEOMETRY, *IMAGE])

REJECTS = pa.schema(
    [
        column("tar_file", pa.string(), "file name of the tar"),
        column("member_path", pa.string(), "member name as stored, undecodable bytes escaped"),
        column("member_offset", pa.int64(), "byte offset of the member's header in the tar"),
        column("member_bytes", pa.int64(), "length of the member's data, bytes"),
        column("reason", pa.string(), "short machine-readable cause"),
        column("detail", pa.string(), "what was expected and what was found"),
    ]
)

# The reason of folder entries: they hold nothing that could be lost, so they are listed but are no sign of a bad tar.
FOLDER_REASON = "directory"

DIFFICULTY = pa.schema(
    [
        column("target_coord_hash", pa.string(), "the anchor's streetview_image_id (an older name, kept)"),
        column("neighbor_building_ids", pa.list_(pa.string()), "building of each neighbour, nearest first"),
        column("neighbor_distances_meters", pa.list_(pa.float64()), "visual distance (not metres; name kept)"),
        column("neighbor_bands", pa.list_(pa.int64()), "difficulty band, 0 hardest to 6 easiest"),
    ]
)

CLUSTER_USAGE = pa.schema(
    [
        column("asset", pa.string(), "asset the job was for"),
        column("partition_key", pa.string(), "partition key; empty for an asset without partitions"),
        column("job", pa.string(), "job id, with _N for task N of an array"),
        column("state", pa.string(), "how it ended, as accounting says; VANISHED when accounting knows nothing"),
        column("node", pa.string(), "node or nodes it ran on; empty when it never started"),
        column("partition", pa.string(), "partition of the cluster"),
        column("start", pa.timestamp("ms"), "when it started, local time of the cluster", nullable=True),
        column("end", pa.timestamp("ms"), "when it ended, local time of the cluster", nullable=True),
        column("elapsed_s", pa.int64(), "seconds it ran"),
        column("cpu_s", pa.float64(), "seconds of processor time it used", nullable=True),
        column("core_s", pa.int64(), "core seconds that were allocated to it"),
        column("gpu_s", pa.int64(), "GPU seconds that were allocated to it"),
        column("memory_mb", pa.float64(), "peak resident memory, MiB", nullable=True),
        column("memory_asked_mb", pa.float64(), "memory asked for, MiB", nullable=True),
        column("gpu_utilisation", pa.float64(), "mean GPU utilisation that the job measured, 0 to 1", nullable=True),
        column("cost", pa.float64(), "at the prices of the settings when it ended"),
    ]
)


def fingerprints(image_size: int) -> pa.Schema:
    """Intermediates plus `fingerprint`: image_size^2 x RGB uint8, row-major H x W x C."""
    dim = image_size * image_size * 3
    field = column("fingerprint", vector_type(dim, "uint8"), f"RGB {image_size}x{image_size}, row-major H x W x C")
    return pa.schema([*IDENTITY, *SOURCE, field, *GEOMETRY, *IMAGE])


def embeddings(dim: int, dtype: str) -> pa.Schema:
    """Intermediates plus `embedding`: pooled backbone features, not normalised."""
    field = column("embedding", vector_type(dim, dtype), "pooled backbone features, not normalised")
    return pa.schema([*IDENTITY, *SOURCE, field, *GEOMETRY, *IMAGE])


def splits(dim: int, dtype: str) -> pa.Schema:
    """Embeddings without `image_path` and `tar_file`."""
    return pa.schema([field for field in embeddings(dim, dtype) if field.name not in {"image_path", "tar_file"}])


def final_embeddings(id_type: pa.DataType, dim: int = 256) -> pa.Schema:
    """New-data vectors: OSMID exactly as it came, and the unit-length vector."""
    return pa.schema(
        [
            pa.field("OSMID", id_type, nullable=True, metadata={"description": "identifier as given in the drop"}),
            column("embedding", vector_type(dim), "L2-normalised 'same building' vector"),
        ]
    )


def building_embeddings(id_type: pa.DataType, dim: int = 256) -> pa.Schema:
    """One vector per OSMID: the renormalised mean of its images' vectors."""
    return pa.schema(
        [
            pa.field("OSMID", id_type, nullable=True, metadata={"description": "identifier as given in the drop"}),
            column("embedding", vector_type(dim), "renormalised mean of the building's image vectors"),
            column("images", pa.int64(), "images pooled"),
            column("coherence", pa.float32(), "length of the mean before renormalising, 1 = all images agree"),
        ]
    )


_PARAMETERS = pa.struct(
    [
        *(pa.field(name, pa.float64()) for name in ("learning_rate", "weight_decay", "margin", "dropout")),
        *(pa.field(name, pa.bool_()) for name in ("use_residual", "use_layer_norm")),
        *(pa.field(name, pa.string()) for name in ("loss_distance", "activation")),
        *(pa.field(name, pa.int64()) for name in ("hidden_dim", "num_hidden_layers", "batch_size")),
        pa.field("hidden_dim_multiplier", pa.float64()),
        pa.field("ucb_exploration_constant", pa.float64()),
        pa.field("ucb_warmup_samples", pa.int64()),
    ]
)
# Of `study.json`, which holds them as JSON.
TRIALS = pa.schema(
    [
        column("number", pa.int64(), "number of the trial in its study, from 0"),
        column("state", pa.string(), "complete; pruned: ended early; failed: by its own fault; lost: its worker was"),
        column("value", pa.float64(), "best recall of any validation; the last one of a pruned trial", nullable=True),
        column("parameters", _PARAMETERS, "hyper-parameters, by the name of their setting"),
        column("epochs", pa.int64(), "epochs trained", nullable=True),
        column("best_epoch", pa.int64(), "epoch of the best validation", nullable=True),
        column("intermediate_values", pa.map_(pa.string(), pa.float64()), "recall of each validation, by epoch"),
        column("started", pa.timestamp("s"), "local time of the worker's machine", nullable=True),
        column("seconds", pa.float64(), "from its beginning to its end", nullable=True),
        column("worker", pa.string(), "worker that ran it", nullable=True),
        column("retry_of", pa.int64(), "lost trial whose hyper-parameters it has", nullable=True),
        column("error", pa.string(), "why it failed", nullable=True),
        column("stopped_early", pa.bool_(), "ended before its last epoch", nullable=True),
        column("validation_queries", pa.int64(), "query images of a validation", nullable=True),
        column("validation_images", pa.int64(), "images searched in a validation", nullable=True),
        column("tracking_run", pa.string(), "MLflow run", nullable=True),
    ]
)


def require(schema: pa.Schema, expected: Sequence[pa.Field], where: str) -> None:
    """Check that `expected` columns are present with their types.

    Raises:
        ArtifactError: naming every column that is missing or of another type.
    """
    faults = []
    for field in expected:
        if field.name not in schema.names:
            faults.append(f"no column {field.name}")
        elif schema.field(field.name).type != field.type:
            faults.append(f"{field.name} is {schema.field(field.name).type}, expected {field.type}")
    if faults:
        raise ArtifactError(f"{where}: {'; '.join(faults)}")

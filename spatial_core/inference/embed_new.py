"""New images -> vectors: a parquet drop becomes a resumable data set of unit-length "same building" vectors.

Every row is accounted for. Unreadable or missing images and rows whose `is_valid` is not true are listed in
`rejects.parquet`; a null OSMID is carried through like any other. How a data set is resumed, refused or replaced is
said in `spatial_core.inference.request`.
"""

from __future__ import annotations

import time
from pathlib import Path

from spatial_core.config.settings import Settings
from spatial_core.inference.dataset import dataset_folder, discard, read_state
from spatial_core.inference.embedding_run import EmbeddingRun
from spatial_core.inference.request import CODE_VERSION, STAGE, choose_root, read_request, refuse_foreign
from spatial_core.interruption import resumable
from spatial_core.report import Progress, Report, silent
from spatial_core.storage.atomic import exclusive
from spatial_core.storage.provenance import finished, manifest_path, read_manifest, record_artifact, renew_manifest

__all__ = ["CODE_VERSION", "STAGE", "embed_parquet"]


def embed_parquet(
    input: Path,  # noqa: A002 - the name the command line and the job registry use
    output_dir: Path,
    settings: Settings,
    progress: Progress = silent,
    model: str | None = None,
) -> Report:
    """Embed every image of a drop.

    Args:
        input: parquet with `image_bytes` (JPEG), `OSMID` (any scalar type), optional `is_valid`.
        output_dir: data set folder: `state.json`, `parts/rgRRRRR_rbBBBBB.parquet`, `rejects.parquet`. When it is a
            file, `<output_dir>.parts` is used instead.
        settings: [inference], [infrastructure] and `paths.model_dir` matter here.
        progress: counts rows.
        model: published model folder, or `owner/name@commit` on a hub; default `paths.model_dir`.

    Returns:
        A report in images, one a row of the drop; with `inference.limit`, those looked at so far.

    Raises:
        ConfigError: if the folder holds a data set of something else, or files that are none.
        InputError: if the drop is not readable; parts before a damaged place are kept. If it has rows but none gives a
            vector; they are listed all the same, and earlier results of a drop of that name stay. If results that new
            ones would replace have files of others among them.
        ModelError, DigestMismatch: if the model cannot be trusted, see `load_published`.
        ArtifactBusy: if another process writes this data set.
        Interrupted: if this process was asked to stop; finished parts are kept.
    """
    started = time.monotonic()
    place = dataset_folder(output_dir)
    with exclusive(place), resumable():
        successor = place.with_name(f".{place.name}.next")
        if not place.exists() and successor.exists():
            successor.replace(place)  # a run was killed between the two renames at its end
        state = read_state(place)
        refuse_foreign(place, state)
        manifest = read_manifest(place)
        known = None if manifest is None else manifest["report"]["details"]["drop"]
        request = read_request(input, settings, str(model or settings.locations.model_dir), known)
        done = finished(place, request.key)
        if done is not None and done.rows_in >= request.rows:
            # Written again since, with the same bytes: what is recorded of it would say it was replaced.
            written_again = known != request.drop_record()
            return renew_manifest(place, request.key, {"drop": request.drop_record()}) if written_again else done
        root, state, note = choose_root(place, successor, state, request)
        run = EmbeddingRun.prepare(root, place, state, request, settings)
        if root == place:
            manifest_path(place).unlink(missing_ok=True)
        run.embed(progress)
        run.require_vectors()
        if root != place:
            manifest_path(place).unlink(missing_ok=True)
            discard(place)
            successor.replace(place)
        report = run.report(place, time.monotonic() - started, note)
        record_artifact(place, request.key, run.dataset.provenance, report)
    return report

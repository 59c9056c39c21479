"""The two text ids of an image, built from its numbers and checked against them, a batch at a time in Arrow.

`building_id` is the data set number padded to four digits, `_`, and the target number; `streetview_image_id` the same
with the patch number. A file whose texts and numbers disagree was put together from different sources: its rows cannot
be assigned to buildings, and it is refused.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from spatial_core.errors import ArtifactError

DATASET_DIGITS = 4
TEXT_COLUMNS = ("building_id", "streetview_image_id")
ID_COLUMNS = ("dataset_id", "target_id", "patch_id", *TEXT_COLUMNS)


def compose_ids(dataset: pa.Array, number: pa.Array) -> pa.Array:
    """int64 data set numbers and target or patch numbers -> ids such as `0061_123`."""
    padded = pc.utf8_lpad(dataset.cast(pa.string()), width=DATASET_DIGITS, padding="0")
    return pc.binary_join_element_wise(padded, number.cast(pa.string()), "_")


def checked_ids(batch: pa.RecordBatch, where: str, first_row: int) -> pa.RecordBatch:
    """The id columns of a batch as int64 and string, every row proved well formed.

    Args:
        batch: holds `ID_COLUMNS` or some of them, integers of any width and strings of any Arrow layout.
        where: the file, for the message.
        first_row: the file's row that is the batch's first, for the message.

    Raises:
        ArtifactError: on a column of another kind, nulls, negative numbers, or texts that do not follow from the
            numbers; the message names the first such row.
    """
    columns: dict[str, pa.Array] = {}
    for name in (name for name in ID_COLUMNS if name in batch.schema.names):
        column = batch.column(name)
        text = name in TEXT_COLUMNS
        fits = _is_text(column.type) if text else pa.types.is_integer(column.type)
        if not fits:
            raise ArtifactError(f"{where}: {name} is {column.type}, expected {'string' if text else 'int64'}")
        if column.null_count:
            row = first_row + pc.index(column.is_null(), True).as_py()
            raise ArtifactError(f"{where}: row {row} has no {name} ({column.null_count} such rows in one batch)")
        try:
            columns[name] = column.cast(pa.string() if text else pa.int64())
        except pa.ArrowInvalid as error:
            raise ArtifactError(f"{where}: {name} does not fit 64 bits ({error})") from error
        if not text and len(column) and pc.min(columns[name]).as_py() < 0:
            row = pc.index(pc.less(columns[name], 0), True).as_py()
            raise ArtifactError(f"{where}: row {first_row + row} has {name} {columns[name][row]}, which is negative")
    for name, number in (("building_id", "target_id"), ("streetview_image_id", "patch_id")):
        if not {name, number, "dataset_id"} <= columns.keys():
            continue
        expected = compose_ids(columns["dataset_id"], columns[number])
        wrong = pc.not_equal(columns[name], expected)
        if pc.any(wrong).as_py():
            row = pc.index(wrong, True).as_py()
            raise ArtifactError(
                f"{where}: row {first_row + row} has {name} {columns[name][row].as_py()!r}, but its dataset_id and "
                f"{number} make {expected[row].as_py()!r}"
            )
    return pa.RecordBatch.from_pydict(columns)


def _is_text(kind: pa.DataType) -> bool:
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(inner)) or bool(pa.types.is_large_string(inner))

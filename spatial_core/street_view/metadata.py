"""The text beside an image: a `d` line of 17 numbers and, in the aligned release, an `a` line of 40.

`d`: data set, target, patch, street view (ids); target latitude, longitude, height; facade normal x, y, z; camera
latitude, longitude, height; distance; heading, pitch, roll. `a`: corrected patch centre 2, warp matrix 9, box 8,
registration matrix 9, SIFT-flow energy, inlier ratio, similarity, distortion, corrected box 8.

The `d` line decides whether the image can be used, so any fault in it rejects the image. The `a` line only grades the
alignment: a damaged one leaves the four alignment values empty and is counted, and the image stays. Lines of other
kinds are passed over.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final, Literal

from spatial_core.errors import InputError

# A `d` and an `a` line take at most some 1 500 bytes.
MAX_TEXT_BYTES: Final = 16_384
_D_NUMBERS: Final = 17
_A_NUMBERS: Final = 40
_ENERGY: Final = 2 + 9 + 8 + 9
_INT64_MAX: Final = 2**63 - 1
# float() and int() also take underscores, other scripts' digits, "nan" and "infinity"; the data set writes none.
_INTEGER: Final = re.compile(r"[+-]?[0-9]+")
_NUMBER: Final = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_NOT_FINITE: Final = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
_IDS: Final = ("dataset id", "target id", "patch id", "street view id")
_MEASURES: Final = (
    "target latitude",
    "target longitude",
    "target height",
    "normal x",
    "normal y",
    "normal z",
    "camera latitude",
    "camera longitude",
    "camera height",
    "distance",
    "heading",
    "pitch",
    "roll",
)
_LIMITS: Final = {
    "target latitude": 90.0,
    "target longitude": 180.0,
    "camera latitude": 90.0,
    "camera longitude": 180.0,
}

AlignmentState = Literal["absent", "present", "malformed"]


class MetadataError(InputError):
    """The text cannot be used. `reason` is a short code for counting, the message says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class FacadeView:
    """One image of one facade point.

    Args:
        dataset_id: data set (tar) number.
        target_id: facade point, unique within its data set.
        patch_id: image, unique within its data set.
        street_view_id: panorama the image was cut from.
        measures: the 13 other numbers of the `d` line, in its order: target latitude and longitude (degrees) and
            height (m); normal x, y, z; camera latitude and longitude (degrees) and height (m); distance (m); heading,
            pitch, roll (degrees).
        alignment: SIFT-flow energy, inlier ratio, similarity, distortion; None each without a sound `a` line.
        alignment_state: whether there was an `a` line, and a sound one.
    """

    dataset_id: int
    target_id: int
    patch_id: int
    street_view_id: int
    measures: tuple[float, ...]
    alignment: tuple[float | None, float | None, float | None, float | None] = (None, None, None, None)
    alignment_state: AlignmentState = "absent"


def parse_metadata(data: bytes, dataset_id: int) -> FacadeView:
    """Read the text of one image.

    Args:
        data: the text member's bytes.
        dataset_id: the data set the tar's name stands for; the text must name the same.

    Raises:
        MetadataError: `text_empty`, `text_undecodable`, `no_d_line`, `several_d_lines`, `d_line_count`,
            `not_a_number`, `not_finite`, `id_not_integer`, `id_negative`, `id_too_large`, `dataset_id_mismatch`,
            `coordinate_out_of_range`.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MetadataError("text_undecodable", f"not UTF-8 at byte {error.start}: {data[error.start]:#04x}") from None
    d_lines: list[list[str]] = []
    a_lines: list[list[str]] = []
    for line in text.splitlines():
        tokens = line.split()
        if tokens and tokens[0] == "d":
            d_lines.append(tokens[1:])
        elif tokens and tokens[0] == "a":
            a_lines.append(tokens[1:])
    if len(d_lines) != 1:
        if d_lines:
            raise MetadataError("several_d_lines", f"{len(d_lines)} d lines; expected one")
        if not text.strip():
            raise MetadataError("text_empty", f"{len(data)} bytes, none of them text; expected a d line")
        raise MetadataError("no_d_line", f"no line starts with 'd '; the text starts with {text[:40]!r}")
    tokens = d_lines[0]
    if len(tokens) != _D_NUMBERS:
        raise MetadataError("d_line_count", f"the d line has {len(tokens)} numbers; expected {_D_NUMBERS}")
    found, target, patch, street_view = (_identifier(token, name) for token, name in zip(tokens[:4], _IDS, strict=True))
    if found != dataset_id:
        raise MetadataError("dataset_id_mismatch", f"the d line says data set {found}, the tar's name {dataset_id}")
    measures = tuple(_measure(token, name) for token, name in zip(tokens[4:], _MEASURES, strict=True))
    view = FacadeView(found, target, patch, street_view, measures)
    if not a_lines:
        return view
    alignment = _alignment(a_lines[0]) if len(a_lines) == 1 else None
    if alignment is None:
        return FacadeView(found, target, patch, street_view, measures, alignment_state="malformed")
    return FacadeView(found, target, patch, street_view, measures, alignment, "present")


def _identifier(token: str, name: str) -> int:
    if not _INTEGER.fullmatch(token):
        _measure(token, name)  # says so if it is no number at all
        raise MetadataError("id_not_integer", f"{name} is {token[:40]!r}; expected an integer")
    digits = token.lstrip("+-").lstrip("0")
    if token[0] == "-" and digits:
        raise MetadataError("id_negative", f"{name} is {token[:40]}; expected 0 or more")
    if len(digits) > len(str(_INT64_MAX)) or int(digits or "0") > _INT64_MAX:
        raise MetadataError("id_too_large", f"{name} is {token[:40]}; at most {_INT64_MAX} (int64)")
    return int(digits or "0")


def _measure(token: str, name: str) -> float:
    if not _NUMBER.fullmatch(token):
        if _NOT_FINITE.fullmatch(token):
            raise MetadataError("not_finite", f"{name} is {token}; expected a finite number")
        raise MetadataError("not_a_number", f"{name} is {token[:40]!r}; expected a number")
    value = float(token)
    if not math.isfinite(value):
        raise MetadataError("not_finite", f"{name} is {token[:40]}, beyond a 64-bit float")
    limit = _LIMITS.get(name)
    if limit is not None and abs(value) > limit:
        raise MetadataError("coordinate_out_of_range", f"{name} is {token[:40]}; at most {limit:g} degrees either way")
    return value


def _alignment(tokens: list[str]) -> tuple[float, float, float, float] | None:
    """SIFT-flow energy, inlier ratio, similarity, distortion; None if the line is not 40 finite numbers."""
    if len(tokens) != _A_NUMBERS or not all(_NUMBER.fullmatch(token) for token in tokens):
        return None
    energy, inliers, similarity, distortion = (float(token) for token in tokens[_ENERGY : _ENERGY + 4])
    if not all(map(math.isfinite, (energy, inliers, similarity, distortion))):
        return None
    return energy, inliers, similarity, distortion

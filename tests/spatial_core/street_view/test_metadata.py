"""The text beside an image: values in their places, and a reason for every fault."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spatial_core.street_view.metadata import MetadataError, parse_metadata
from tests.data.make_tars import a_line, d_line

D = "d 201 663 3307 48384 52.51935 13.40075 6.9 -0.15 -0.98 0.01 52.5189 13.4002 2.3 57.2 32.6 4.6 0"
A = "a " + " ".join(str(number) for number in range(40))


def parse(text: str) -> object:
    return parse_metadata(text.encode(), 201)


def test_every_number_in_its_place() -> None:
    view = parse_metadata(f"{D}\n{A}\n".encode(), 201)
    assert (view.dataset_id, view.target_id, view.patch_id, view.street_view_id) == (201, 663, 3307, 48384)
    assert view.measures == (52.51935, 13.40075, 6.9, -0.15, -0.98, 0.01, 52.5189, 13.4002, 2.3, 57.2, 32.6, 4.6, 0.0)
    # patch centre 2, warp 9, box 8 and registration 9 come before the four that are kept
    assert view.alignment == (28.0, 29.0, 30.0, 31.0)
    assert view.alignment_state == "present"


@pytest.mark.parametrize(
    "text",
    [
        D,
        f"{D}\n",
        f"\r\n{D}\r\n",
        f"  {D}  \n",
        D.replace(" ", "\t"),
        D.replace(" ", "  "),
        f"# made by hand\n{D}\nz 1 2\n",
        D.replace("201", "0201").replace(" 663", " +663"),
        D.replace("57.2", "5.72e1").replace("6.9", "6.90").replace("0.01", ".01"),
    ],
)
def test_spellings_of_one_line(text: str) -> None:
    assert parse(text) == parse(D)


@pytest.mark.parametrize(
    "line",
    ["a 1 2 3", f"{A} 40", A.replace("29", "nan"), A.replace("31", "1e999"), A.replace("5", "five"), f"{A}\n{A}"],
)
def test_a_damaged_alignment_line_leaves_the_image_without_alignment(line: str) -> None:
    view = parse_metadata(f"{D}\n{line}\n".encode(), 201)
    assert view.alignment == (None, None, None, None)
    assert view.alignment_state == "malformed"
    assert view.patch_id == 3307


@pytest.mark.parametrize(
    ("text", "reason", "named"),
    [
        ("", "text_empty", "0 bytes"),
        (" \n", "text_empty", "2 bytes"),
        (A, "no_d_line", "'a 0 1"),
        (D.replace("d ", "D "), "no_d_line", "'D 201"),
        (D.replace("d ", "d"), "no_d_line", "'d201"),
        (f"{D}\n{D}", "several_d_lines", "2 d lines"),
        (D[:-2], "d_line_count", "16 numbers"),
        (f"{D} 0", "d_line_count", "18 numbers"),
        ("d", "d_line_count", "0 numbers"),
        (D.replace("6.9", "tall"), "not_a_number", "target height is 'tall'"),
        (D.replace("6.9", "6,9"), "not_a_number", "6,9"),
        (D.replace("6.9", "0x6"), "not_a_number", "0x6"),
        (D.replace("663", "many"), "not_a_number", "target id is 'many'"),
        (D.replace("57.2", "NaN"), "not_finite", "distance is NaN"),
        (D.replace("57.2", "-Infinity"), "not_finite", "distance"),
        (D.replace("57.2", "1e400"), "not_finite", "distance"),
        (D.replace("3307", "3307.0"), "id_not_integer", "patch id is '3307.0'"),
        (D.replace("48384", "-48384"), "id_negative", "street view id is -48384"),
        (D.replace("48384", str(2**63)), "id_too_large", "at most 9223372036854775807"),
        (D.replace("201", "202"), "dataset_id_mismatch", "data set 202, the tar's name 201"),
        (D.replace("52.51935", "90.0001"), "coordinate_out_of_range", "target latitude is 90.0001"),
        (D.replace("13.4002", "180.1"), "coordinate_out_of_range", "camera longitude is 180.1"),
    ],
)
def test_faults(text: str, reason: str, named: str) -> None:
    with pytest.raises(MetadataError) as caught:
        parse(text)
    assert caught.value.reason == reason
    assert named in str(caught.value)


def test_limits_themselves_are_good() -> None:
    text = D.replace("52.51935 13.40075", "-90 180").replace("48384", str(2**63 - 1))
    view = parse_metadata(text.encode(), 201)
    assert (view.measures[:2], view.street_view_id) == ((-90.0, 180.0), 2**63 - 1)


def test_bytes_that_are_not_text() -> None:
    with pytest.raises(MetadataError, match="not UTF-8 at byte 3: 0xff"):
        parse_metadata(b"d 1\xff", 201)


@given(st.integers(0, 2**32))
def test_what_is_written_is_read(seed: int) -> None:
    rng = np.random.default_rng(seed)
    line = d_line(rng, 201, 5, 6, 7)
    view = parse_metadata((line + a_line(rng)).encode(), 201)
    assert list(view.measures) == [float(token) for token in line.split()[5:]]
    assert all(value is not None and math.isfinite(value) for value in view.alignment)


@given(
    st.binary(max_size=300)
    | st.text(max_size=100).map(str.encode)
    | st.text("da 0123.-e\n", max_size=200).map(str.encode)
)
def test_nothing_but_its_own_error_escapes(data: bytes) -> None:
    try:
        parse_metadata(data, 201)
    except MetadataError as error:
        assert error.reason

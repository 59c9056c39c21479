"""The plan of the demo city: what makes its geometry, leakage and look-alikes mean something."""

from __future__ import annotations

import itertools
import math

import pytest

from spatial_core.config.sections import DemoSection
from spatial_core.demo.layout import UNSEEN_DISTRICT, District, plan_district
from spatial_core.demo.styles import style_table

SEED = 7
DEMO = DemoSection(buildings_per_tar=100)


@pytest.fixture(scope="module")
def district() -> District:
    return plan_district(SEED, DEMO, 0, DEMO.buildings_per_tar)


def test_a_district_depends_on_seed_and_number_only(district: District) -> None:
    plan_district.cache_clear()
    more_tars = DEMO.model_copy(update={"tars": 9})

    assert plan_district(SEED, more_tars, 0, DEMO.buildings_per_tar) == district
    assert plan_district(SEED + 1, DEMO, 0, DEMO.buildings_per_tar) != district
    assert plan_district(SEED, DEMO, 1, DEMO.buildings_per_tar).streets != district.streets


def test_every_target_has_its_views_and_they_differ_from_the_spare_ones(district: District) -> None:
    assert len(district.targets) == DEMO.buildings_per_tar
    assert len({target.target_id for target in district.targets}) == DEMO.buildings_per_tar
    counts = {len(target.views) for target in district.targets}
    assert counts == set(range(DEMO.min_views, DEMO.max_views + 1))
    assert all(not set(target.views) & set(target.spare) for target in district.targets)


def test_targets_lie_on_their_facade_and_face_their_cameras(district: District) -> None:
    for target in district.targets:
        street = district.streets[target.street]
        plane = street.facade(street.buildings[target.building])
        offset = [a - b for a, b in zip(target.point, plane.corner, strict=True)]
        across = sum(a * b for a, b in zip(offset, plane.right, strict=True))
        assert 0 < across < plane.width_m
        assert sum(a * b for a, b in zip(offset, target.normal, strict=True)) == pytest.approx(0, abs=1e-9)
        assert math.hypot(*target.normal) == pytest.approx(1)
        for view in (*target.views, *target.spare):
            stop = street.panoramas[view]
            towards = [
                a - b
                for a, b in zip(street.place(stop.along_m, stop.across_m, stop.height_m), target.point, strict=True)
            ]
            facing = sum(a * b for a, b in zip(towards, target.normal, strict=True)) / math.hypot(*towards)
            assert facing > math.cos(math.radians(62))


def test_houses_of_a_row_do_not_overlap(district: District) -> None:
    for street in district.streets:
        for side in (1, -1):
            row = sorted((b.start_m, b.start_m + b.look.width_m) for b in street.buildings if b.side == side)
            assert all(end <= start + 1e-3 for (_, end), (start, _) in itertools.pairwise(row))


def test_some_buildings_have_two_targets_some_metres_apart(district: District) -> None:
    on_building: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
    for target in district.targets:
        on_building.setdefault((target.street, target.building), []).append(target.point)
    pairs = [points for points in on_building.values() if len(points) == 2]

    assert 0 < len(pairs) < len(on_building) / 5
    assert all(2 < math.dist(*points) < 12 for points in pairs)
    assert max(map(len, on_building.values())) == 2


def test_neighbours_are_near_enough_to_leak_and_to_be_false_negatives(district: District) -> None:
    points = [target.point for target in district.targets]
    nearest = [min(math.dist(a, b) for b in points if b != a) for a in points]

    assert sum(distance < 25 for distance in nearest) > 0.9 * len(points)
    assert max(math.dist(points[0], b) for b in points) > 100


def test_districts_are_apart() -> None:
    plans = [plan_district(SEED, DEMO, number, DEMO.buildings_per_tar) for number in (UNSEEN_DISTRICT, 0, 1, 2, 3)]
    for index, one in enumerate(plans):
        for other in plans[index + 1 :]:
            assert min(math.dist(a.point, b.point) for a in one.targets for b in other.targets) > 100


def test_a_street_has_look_alikes(district: District) -> None:
    for street in district.streets:
        names = [building.look.style.name for building in street.buildings]
        assert len(set(names)) < len(names)
        looks = [building.look for building in street.buildings]
        assert len(set(looks)) == len(looks)


def test_more_styles_than_described_are_other_hues() -> None:
    table = style_table(30)

    assert len({style.name for style in table}) == 30
    assert len({style.walls for style in table}) == 30
    assert table[:12] == style_table(12)

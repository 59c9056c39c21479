"""A watched folder, observation by observation, with real files."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from spatial_core.errors import ArtifactError, InputError
from spatial_core.storage.watch import Rules, Scan, WatchState, scan

TARS = Rules(".tar", r"\d{4}\.tar", re.compile(r"\d{4}"))


class Watcher:
    """Observes a folder again and again, remembering the state as a cursor would: as text."""

    def __init__(self, folder: Path, rules: Rules = TARS) -> None:
        self.folder = folder
        self.rules = rules
        self.cursor: str | None = None

    def look(self, **options: float) -> Scan:
        previous = WatchState.from_json(self.cursor)
        seen = scan(self.folder, self.rules, previous, **{"budget_s": 60.0, **options})  # type: ignore[arg-type]
        self.cursor = seen.state.to_json()
        return seen


@pytest.fixture
def watcher(tmp_path: Path) -> Watcher:
    return Watcher(tmp_path)


def write(path: Path, content: bytes, mtime_s: int = 1_000) -> None:
    path.write_bytes(content)
    os.utime(path, (mtime_s, mtime_s))


def names(found: tuple[object, ...]) -> list[str]:
    return [file.name for file in found]  # type: ignore[attr-defined]


def test_a_file_is_new_at_the_second_look_and_never_again(watcher: Watcher) -> None:
    write(watcher.folder / "0201.tar", b"abc")
    first = watcher.look()
    assert (first.new, first.pending) == ((), ("0201.tar",))
    second = watcher.look()
    assert [(file.key, file.bytes, file.version) for file in second.new] == [("0201", 3, "3-1000000000000")]
    third = watcher.look()
    assert (third.new, third.changed, third.pending, third.gone) == ((), (), (), ())


def test_a_growing_file_is_not_whole_until_it_stops(watcher: Watcher) -> None:
    path = watcher.folder / "0201.tar"
    for size in range(1, 5):
        write(path, b"x" * size)
        assert watcher.look().pending == ("0201.tar",)
    assert names(watcher.look().new) == ["0201.tar"]


def test_same_size_with_another_time_is_still_being_written(watcher: Watcher) -> None:
    path = watcher.folder / "0201.tar"
    write(path, b"abc", mtime_s=1)
    watcher.look()
    write(path, b"abd", mtime_s=2)
    assert watcher.look().new == ()
    assert names(watcher.look().new) == ["0201.tar"]


def test_an_old_time_proves_nothing(watcher: Watcher) -> None:
    """`cp -p` and `rsync -t` set the source's time, so an old file may still be arriving."""
    write(watcher.folder / "0201.tar", b"ab", mtime_s=1)
    assert watcher.look().new == ()
    write(watcher.folder / "0201.tar", b"abcd", mtime_s=1)
    assert watcher.look().new == ()


def test_an_empty_file_waits(watcher: Watcher) -> None:
    write(watcher.folder / "0201.tar", b"")
    assert [watcher.look().pending for _ in range(3)] == [("0201.tar",)] * 3


def test_temporary_names_are_ignored_and_a_rename_is_an_arrival(watcher: Watcher) -> None:
    write(watcher.folder / ".0201.tar.Xy12", b"abc")
    seen = watcher.look()
    assert (seen.pending, dict(seen.unfit)) == ((), {})
    (watcher.folder / ".0201.tar.Xy12").rename(watcher.folder / "0201.tar")
    assert watcher.look().pending == ("0201.tar",)
    assert names(watcher.look().new) == ["0201.tar"]


def test_a_replaced_file_is_changed_once_it_is_whole_again(watcher: Watcher) -> None:
    path = watcher.folder / "0201.tar"
    write(path, b"abc")
    watcher.look(), watcher.look()
    write(path, b"abcdef", mtime_s=2_000)
    half = watcher.look()
    assert (half.changed, half.pending) == ((), ("0201.tar",))
    whole = watcher.look()
    assert (names(whole.changed), whole.new) == (["0201.tar"], ())
    assert whole.changed[0].bytes == 6
    assert watcher.look().changed == ()


def test_a_file_touched_and_restored_is_not_changed(watcher: Watcher) -> None:
    path = watcher.folder / "0201.tar"
    write(path, b"abc")
    watcher.look(), watcher.look()
    write(path, b"abcd", mtime_s=2_000)
    watcher.look()
    write(path, b"abc")
    seen = watcher.look()
    assert (seen.changed, seen.pending) == ((), ())


def test_a_removed_file_is_gone_once_and_back_when_it_returns(watcher: Watcher) -> None:
    path = watcher.folder / "0201.tar"
    write(path, b"abc")
    watcher.look(), watcher.look()
    path.unlink()
    assert watcher.look().gone == ("0201.tar",)
    assert watcher.look().gone == ()
    write(path, b"abc")
    seen = watcher.look()
    assert (names(seen.back), seen.new, seen.changed) == (["0201.tar"], (), ())
    path.unlink()
    assert watcher.look().gone == ("0201.tar",)


def test_a_renamed_file_is_one_gone_and_one_new(watcher: Watcher) -> None:
    write(watcher.folder / "0201.tar", b"abc")
    watcher.look(), watcher.look()
    (watcher.folder / "0201.tar").rename(watcher.folder / "0202.tar")
    first = watcher.look()
    assert (first.gone, first.pending) == (("0201.tar",), ("0202.tar",))
    second = watcher.look()
    assert (second.gone, names(second.new), second.changed) == ((), ["0202.tar"], ())


def test_a_removed_file_that_returns_different_is_changed(watcher: Watcher) -> None:
    path = watcher.folder / "0201.tar"
    write(path, b"abc")
    watcher.look(), watcher.look()
    path.unlink()
    watcher.look()
    write(path, b"other", mtime_s=5)
    watcher.look()
    assert names(watcher.look().changed) == ["0201.tar"]


def test_unfit_names_are_told_once_and_never_registered(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    unfit = ["README.md", "201.tar", "0201.tar.gz", "02$1.tar", "0201 .tar", "0" * 200 + ".tar", "0204.tar\n"]
    for name in unfit:
        write(folder / name, b"abc")
    (folder / "0202.tar").mkdir()
    (folder / "0203.tar").symlink_to(tmp_path / "nothing")
    watcher = Watcher(folder)
    told = watcher.look().unfit
    assert set(told) == {*unfit, "0202.tar", "0203.tar"}
    assert "does not match" in told["201.tar"]
    assert told["0203.tar"] == "is a link to nothing"
    again = watcher.look()
    assert (dict(again.unfit), again.new, again.pending) == ({}, (), ())
    (folder / "201.tar").unlink()
    watcher.look()
    write(folder / "201.tar", b"abc")
    assert set(watcher.look().unfit) == {"201.tar"}


def test_undecodable_names_survive_the_cursor(watcher: Watcher) -> None:
    (Path(os.fsdecode(os.fsencode(watcher.folder) + b"/\xff\xfe.tar"))).write_bytes(b"abc")
    assert len(watcher.look().unfit) == 1
    assert len(watcher.look().unfit) == 0


@pytest.mark.parametrize("key", ["..", "a/b", "$(x)", "a\nb", "x" * 300, "", "-rf"])
def test_a_setting_cannot_admit_a_key_that_is_unsafe(key: str) -> None:
    lax = Rules(".parquet", r"(?s).*", re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}"))
    assert lax.fault(f"{key}.parquet") is not None
    assert lax.fault("fine_name-1.parquet") is None


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", b"abc")
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "0201.tar").symlink_to(tmp_path / "elsewhere")
    watcher = Watcher(folder)
    watcher.look()
    assert [file.bytes for file in watcher.look().new] == [3]


def test_thousands_of_files_within_a_budget(watcher: Watcher) -> None:
    """Every look visits a part, the next goes on there, and after enough looks everything is registered once."""
    total = 3_000
    for number in range(total):
        (watcher.folder / f"{number:04d}.tar").write_bytes(b"x")
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.01
        return now

    registered: list[str] = []
    looks = 0
    while len(registered) < total:
        seen = watcher.look(budget_s=10.0, clock=clock)  # type: ignore[arg-type]
        assert len(seen.new) <= 1_000
        registered += names(seen.new)
        looks += 1
        assert looks < 20, "no progress"
    assert sorted(registered) == [f"{number:04d}.tar" for number in range(total)]
    assert looks > 3, "the budget never bit"
    quiet = watcher.look()
    assert quiet.complete and not quiet.new


def test_a_tiny_budget_still_makes_progress(watcher: Watcher) -> None:
    for number in range(3):
        write(watcher.folder / f"000{number}.tar", b"x")
    registered: list[str] = []
    for _ in range(6):
        registered += names(watcher.look(budget_s=-1.0).new)
    assert sorted(registered) == ["0000.tar", "0001.tar", "0002.tar"]


def test_the_limit_holds_reports_back_without_losing_any(watcher: Watcher) -> None:
    for number in range(10):
        write(watcher.folder / f"000{number}.tar", b"x")
    watcher.look()
    registered = [names(watcher.look(limit=4).new) for _ in range(3)]
    assert [len(part) for part in registered] == [4, 4, 2]
    assert len({name for part in registered for name in part}) == 10


def test_a_folder_that_cannot_be_listed_concludes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be listed"):
        scan(tmp_path / "absent", TARS, WatchState(), budget_s=1.0)


@pytest.mark.parametrize("text", ["{", "[]", "null", '"x"', '{"v": 2}', '{"v": 1}', '{"v":1,"known":{"a":[1]}}'])
def test_a_damaged_cursor_is_named(text: str) -> None:
    with pytest.raises(ArtifactError, match="watch state"):
        WatchState.from_json(text)


def test_no_cursor_is_the_empty_state() -> None:
    assert WatchState.from_json(None) == WatchState() == WatchState.from_json("")


def test_the_state_survives_as_text() -> None:
    state = WatchState({"a.tar": (1, 2)}, {"b.tar": (3, 4)}, {"c.tar": (5, 6)}, ("d",), "b.tar")
    assert WatchState.from_json(state.to_json()) == state

"""Joins images with their texts, wherever they lie in the tar, and decides which pairs become rows.

Findings arrive in tar order. A pair is complete when its second half arrives; rows are in that order, which for tars
that hold the two side by side is the tar's own. Halves still waiting are kept packed, about 0.3 KB each.

What else is decided here:

* A member that cannot be used takes its partner with it: the partner is rejected as `partner_rejected`.
* Of several members with one stem and role (one name twice, or x.jpg beside x.jpeg) the first counts, later ones are
  `duplicate_member`; of several pairs with one patch id the first complete one counts, later ones are
  `duplicate_patch_id`.
* The flat layout writes the four ids into the file name. A pair is refused as `name_contradicts_text` only when the
  name starts with the tar's own data set id and its other three ids are not those of the text in any order: then image
  and text were mixed up. Names of another form say nothing.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from spatial_core.street_view.member_checks import Fault, Finding, ImageFacts, Role, Task
from spatial_core.street_view.metadata import AlignmentState, FacadeView
from spatial_core.street_view.seen_keys import SeenKeys
from spatial_core.street_view.table_buffer import TableBuffer
from spatial_core.street_view.tar_index import TarMember
from spatial_core.street_view.waiting_halves import WaitingHalves

_FLAT_NAME: Final = re.compile(r"([0-9]{1,19})_([0-9]{1,19})_([0-9]{1,19})_([0-9]{1,19})")
_ALIGNMENT_STATES: Final[tuple[AlignmentState, ...]] = ("absent", "present", "malformed")
_PLACE: Final = struct.Struct("<3q")
_IMAGE: Final = struct.Struct("<2i32s")
_TEXT: Final = struct.Struct("<4q13d4dB")
_KEYS: Final[dict[Role, bytes]] = {"image": b"i", "text": b"t"}
_PARTNERS: Final[dict[Role, Role]] = {"image": "text", "text": "image"}
_REJECTED: Final = b""


@dataclass
class Tally:
    """Counts of one tar.

    Args:
        pairs: rows written.
        rejected: reason -> members.
        alignment: state of the `a` line -> rows.
    """

    pairs: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    alignment: Counter[str] = field(default_factory=Counter)


class Pairing:
    """Turns findings into rows of `schemas.INTERMEDIATES` and `schemas.REJECTS`.

    Args:
        dataset_id: the data set that the tar's name stands for.
        tar_name: file name of the tar.
        rows: takes the rows.
        rejects: takes the rejected members.
        waiting: keeps the halves whose partner has not come yet.
    """

    def __init__(
        self, dataset_id: int, tar_name: str, rows: TableBuffer, rejects: TableBuffer, waiting: WaitingHalves
    ) -> None:
        self.tally = Tally()
        self.dataset_id = dataset_id
        self._tar_name = tar_name
        self._rows = rows
        self._rejects = rejects
        self._members = SeenKeys()
        self._patches = SeenKeys()
        self._targets = SeenKeys()
        self._waiting = waiting

    @property
    def buildings(self) -> int:
        """Facade points with at least one row."""
        return len(self._targets)

    def take(self, task: Task, finding: Finding) -> None:
        """Take the next image or text in tar order."""
        member, role = task.member, task.role
        stem = hashlib.blake2b(task.stem.encode(), digest_size=16).digest()
        if not self._members.add(int.from_bytes(stem[:8] if role == "image" else stem[8:])):
            self.reject(member, Fault("duplicate_member", f"a member before it is the {role} of {task.stem!r}"))
            return
        partner = self._waiting.pop(_KEYS[_PARTNERS[role]] + stem)
        if isinstance(finding, Fault):
            self.reject(member, finding)
            if partner is None:
                self._waiting.add(_KEYS[role] + stem, member.offset, _REJECTED)
            elif partner != _REJECTED:
                self.reject(_unpack_place(partner), Fault("partner_rejected", f"its {role} is rejected"))
        elif partner is None:
            self._waiting.add(_KEYS[role] + stem, member.offset, _pack(member, finding))
        elif partner == _REJECTED:
            self.reject(member, Fault("partner_rejected", f"its {_PARTNERS[role]} is rejected"))
        elif isinstance(finding, ImageFacts):
            other, view = _unpack_text(partner)
            self._join(task.stem, member, finding, other, view)
        else:
            other, facts = _unpack_image(partner)
            self._join(task.stem, other, facts, member, finding)

    def finish(self) -> None:
        """Reject every half whose partner never came, in tar order."""
        for packed in self._waiting.remaining():
            if packed != _REJECTED:
                is_image = packed[_PLACE.size] == _IMAGE.size
                role, missing = ("image", "text (.txt)") if is_image else ("text", "image (.jpg, .jpeg)")
                fault = Fault(f"orphan_{role}", f"the tar has no {missing} of the same stem")
                self.reject(_unpack_place(packed), fault)

    def _join(self, stem: str, image: TarMember, facts: ImageFacts, text: TarMember, view: FacadeView) -> None:
        fault = self._contradiction(stem, view)
        if fault is None and not self._patches.add(view.patch_id):
            fault = Fault("duplicate_patch_id", f"a pair before it has patch id {view.patch_id}")
        if fault is not None:
            for member in sorted((image, text), key=lambda half: half.offset):
                self.reject(member, fault)
            return
        number = f"{self.dataset_id:04d}"
        self._targets.add(view.target_id)
        self.tally.pairs += 1
        self.tally.alignment[view.alignment_state] += 1
        self._rows.append(
            (
                view.dataset_id,
                view.target_id,
                view.patch_id,
                view.street_view_id,
                *view.measures[:2],
                f"{number}_{view.target_id}",
                f"{number}_{view.patch_id}",
                image.name,
                self._tar_name,
                *view.measures[2:],
                *view.alignment,
                image.data_offset,
                image.size,
                facts.width,
                facts.height,
                facts.sha256.hex(),
            )
        )

    def _contradiction(self, stem: str, view: FacadeView) -> Fault | None:
        name = stem.rpartition("/")[2]
        match = _FLAT_NAME.fullmatch(name)
        if match is None:
            return None
        dataset_id, *ids = map(int, match.groups())
        said = [view.patch_id, view.street_view_id, view.target_id]
        if dataset_id != self.dataset_id or sorted(ids) == sorted(said):
            return None
        detail = (
            f"the name {name!r} and the text disagree: it says patch {said[0]}, street view {said[1]}, target {said[2]}"
        )
        return Fault("name_contradicts_text", detail)

    def reject(self, member: TarMember, fault: Fault) -> None:
        """Record a member that cannot be used."""
        self.tally.rejected[fault.reason] += 1
        path = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        self._rejects.append((self._tar_name, path, member.offset, member.size, fault.reason, fault.detail))


def _pack(member: TarMember, finding: FacadeView | ImageFacts) -> bytes:
    place = _PLACE.pack(member.offset, member.data_offset, member.size)
    if isinstance(finding, ImageFacts):
        body = _IMAGE.pack(finding.width, finding.height, finding.sha256)
    else:
        body = _TEXT.pack(
            finding.dataset_id,
            finding.target_id,
            finding.patch_id,
            finding.street_view_id,
            *finding.measures,
            *(math.nan if value is None else value for value in finding.alignment),
            _ALIGNMENT_STATES.index(finding.alignment_state),
        )
    return place + bytes([len(body)]) + body + member.name.encode()


def _unpack_place(packed: bytes) -> TarMember:
    offset, data_offset, size = _PLACE.unpack_from(packed)
    name = packed[_PLACE.size + 1 + packed[_PLACE.size] :].decode()
    return TarMember(name, "file", offset, data_offset, size)


def _unpack_image(packed: bytes) -> tuple[TarMember, ImageFacts]:
    return _unpack_place(packed), ImageFacts(*_IMAGE.unpack_from(packed, _PLACE.size + 1))


def _unpack_text(packed: bytes) -> tuple[TarMember, FacadeView]:
    dataset_id, target_id, patch_id, street_view_id, *numbers, state = _TEXT.unpack_from(packed, _PLACE.size + 1)
    energy, inliers, similarity, distortion = (None if math.isnan(value) else value for value in numbers[13:])
    return _unpack_place(packed), FacadeView(
        dataset_id,
        target_id,
        patch_id,
        street_view_id,
        tuple(numbers[:13]),
        (energy, inliers, similarity, distortion),
        _ALIGNMENT_STATES[state],
    )

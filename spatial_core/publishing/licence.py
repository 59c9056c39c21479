"""Which licence a published model is under, and the text that is shipped with it.

A model folder may hold the backbone's weights, so by default the whole follows the backbone's licence, with the text
that lies beside its weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from spatial_core.backbones.family import Family

APACHE = "apache-2.0"
_FILE_NAMES = ("LICENSE.md", "LICENSE", "LICENSE.txt", "LICENCE", "LICENCE.md")


@dataclass(frozen=True)
class Licence:
    """A licence as the model card names it, with its text.

    Args:
        identifier: `license` of the card: an SPDX id in lower case, or `other`.
        name: `license_name` of the card, where the identifier is `other`.
        link: `license_link` of the card, where the identifier is `other`.
        text: content of the LICENSE file.
        complete: whether `text` holds the full terms. A notice that only names them does not suffice to pass the
            backbone's weights on.
    """

    identifier: str
    name: str | None
    link: str | None
    text: str
    complete: bool


def choose_licence(setting: str, family: Family, backbone_folder: Path) -> Licence:
    """Licence of a model on a backbone of `family`.

    Args:
        setting: `publishing.license`: `auto`, or an SPDX id that wins.
        family: kind of the backbone.
        backbone_folder: where the backbone's files lie; its own licence text is taken from there.
    """
    identifier = family.license if setting == "auto" else setting.lower()
    if identifier == APACHE:
        text = files("spatial_core.publishing").joinpath("apache-2.0.txt").read_text()
        return Licence(identifier, None, None, text, complete=True)
    own_text = _own_text(backbone_folder)
    own = family.license_name if setting == "auto" else setting
    terms = (
        f"The projection head in this folder is offered under: {own}\n"
        f"The backbone is of the {family.name} family; its weights are under: {family.license_name}\n"
        f"{family.license_url}\n"
    )
    if own_text is None:
        terms += "Whoever passes the backbone's weights on must pass on a copy of those terms.\n"
    else:
        terms += f"\nThe terms as shipped with the backbone:\n\n{own_text.rstrip()}\n"
    other = identifier == "other"
    return Licence(
        identifier=identifier,
        name=family.license_name if other else None,
        link=family.license_url if other else None,
        text=terms,
        complete=own_text is not None,
    )


def _own_text(folder: Path) -> str | None:
    found = [folder / name for name in _FILE_NAMES if (folder / name).is_file()]
    return found[0].read_text(errors="replace") if found else None

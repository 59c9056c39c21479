"""Which licence a published model is under, and the text that is shipped with it.

The head is a derivative of nothing but the training data's features, but a model folder may hold the backbone's weights
too, so by default the whole follows the backbone: DINOv2 is Apache-2.0, DINOv3 has a licence of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

_FILE_NAMES = ("LICENSE.md", "LICENSE", "LICENSE.txt", "LICENCE", "LICENCE.md")
_DINOV3_URL = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"


@dataclass(frozen=True)
class Licence:
    """A licence as the model card names it, with its text.

    Args:
        identifier: `license` of the card: an SPDX id in lower case, or `other`.
        name: `license_name` of the card, when the identifier is `other`.
        link: `license_link` of the card, when the identifier is `other`.
        text: content of the LICENSE file.
        complete: whether `text` holds the full terms; a notice that only names them does not suffice to pass weights on.
    """

    identifier: str
    name: str | None
    link: str | None
    text: str
    complete: bool


def choose_licence(setting: str, family: str, backbone_folder: Path | None) -> Licence:
    """Licence of a model on a backbone of `family`.

    Args:
        setting: `publishing.license`: `auto`, or an SPDX id that wins.
        family: transformers' model type of the backbone, for example `dinov2` or `dinov3_vit`.
        backbone_folder: where the backbone's files lie; its own licence text is taken from there.
    """
    own_text = None if backbone_folder is None else _own_text(backbone_folder)
    identifier = setting.lower()
    if identifier == "auto":
        if family.startswith("dinov2"):
            identifier = "apache-2.0"
        else:
            return _other(family, own_text)
    if identifier == "apache-2.0":
        text = files("spatial_core.publishing").joinpath("apache-2.0.txt").read_text()
        return Licence(identifier, None, None, text, complete=True)
    notice = f"The projection head in this folder is licensed under: {setting} (SPDX identifier).\n"
    return Licence(identifier, None, None, notice + _backbone_terms(family, own_text), complete=own_text is not None)


def _other(family: str, own_text: str | None) -> Licence:
    dinov3 = family.startswith("dinov3")
    return Licence(
        identifier="other",
        name="dinov3-license" if dinov3 else f"{family.replace('_', '-')}-backbone-license",
        link=_DINOV3_URL if dinov3 else "LICENSE",
        text="The projection head in this folder is offered under the terms of the backbone it belongs to.\n"
        + _backbone_terms(family, own_text),
        complete=own_text is not None,
    )


def _backbone_terms(family: str, own_text: str | None) -> str:
    if own_text is not None:
        return f"\nLicence of the backbone, as shipped with it:\n\n{own_text.rstrip()}\n"
    if family.startswith("dinov3"):
        return (
            "\nThe backbone is a DINOv3 model by Meta Platforms, Inc., under the DINOv3 License:\n"
            f"{_DINOV3_URL}\nWhoever passes its weights on must pass on a copy of that agreement.\n"
        )
    if family.startswith("dinov2"):
        return "\nThe backbone is a DINOv2 model by Meta Platforms, Inc., under the Apache License 2.0.\n"
    return f"\nThe backbone ({family}) has its own terms; they were not shipped with its files.\n"


def _own_text(folder: Path) -> str | None:
    found = [folder / name for name in _FILE_NAMES if (folder / name).is_file()]
    return found[0].read_text(errors="replace") if found else None

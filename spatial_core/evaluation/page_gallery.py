"""The gallery of the page: a query, its five nearest images, and its best right answer, in a row."""

from __future__ import annotations

from html import escape

from spatial_core.evaluation.gallery import Example, Gallery, Shown
from spatial_core.evaluation.thumbnails import Thumbnails

_ARROW = '<div class="arrow">\N{RIGHTWARDS ARROW}</div>'


def gallery_section(gallery: Gallery, thumbnails: Thumbnails) -> str:
    """Right and wrong examples, with the reason in place of every picture that cannot be shown."""
    missing = ""
    if thumbnails.missing:
        names = ", ".join(escape(name) for name in thumbnails.missing)
        missing = f'<p class="empty">Some pictures are not shown, because these files are not there: {names}.</p>'
    blocks = [
        _block("Found", "The nearest image shows the same building.", gallery.right, thumbnails),
        _block(
            "Not found",
            "The nearest image shows another building; the least wrong come first.",
            gallery.wrong,
            thumbnails,
        ),
    ]
    return (
        "<section><h2>Right and wrong, side by side</h2>"
        f'<p class="sub">Queries of the {gallery.split} split drawn at random, one a building: not chosen to please. '
        f"Under each picture stands its building and its cosine with the query.</p>{missing}{''.join(blocks)}</section>"
    )


def _block(title: str, text: str, examples: tuple[Example, ...], thumbnails: Thumbnails) -> str:
    head = f'<h3 style="margin-top:26px">{title}</h3><p class="sub" style="margin:0">{text}</p>'
    if not examples:
        return f'{head}<div class="empty" style="margin-top:12px">There is no such query.</div>'
    names = (
        '<div class="columns"><div>query</div><div></div><div>nearest images, best first</div><div></div>'
        "<div>best right answer</div></div>"
    )
    rows = "".join(_row(example, thumbnails) for example in examples)
    return f'{head}{names}<div class="examples">{rows}</div>'


def _row(example: Example, thumbnails: Thumbnails) -> str:
    query = _figure(example.query, "query", "<b>query</b>", thumbnails)
    found = "".join(_figure(image, *_mark(image), thumbnails) for image in example.neighbours)
    truth = _figure(
        example.truth,
        "right",
        f"<b>rank {example.truth_rank:,}</b> \N{MIDDLE DOT} {example.truth.cosine:.4f}",
        thumbnails,
    )
    return f'<div class="example">{query}{_ARROW}<div class="found">{found}</div>{_ARROW}{truth}</div>'


def _mark(image: Shown) -> tuple[str, str]:
    """CSS class and caption; a sign besides the colour, for those who cannot tell red from green."""
    css, sign = ("right", "\N{CHECK MARK}") if image.right else ("wrong", "\N{BALLOT X}")
    return css, f'<b>{image.cosine:.4f}</b> <span class="sign">{sign}</span>'


def _figure(image: Shown, css: str, caption: str, thumbnails: Thumbnails) -> str:
    name = f"image {image.image} of building {image.building}"
    picture = thumbnails.pictures.get(image.image)
    if picture is None:
        reason = thumbnails.reasons.get(image.image, "no picture")
        inside = f'<div class="gone">{escape(reason)}</div>'
    else:
        inside = f'<img src="{picture}" alt="{escape(name)}" title="{escape(name)}">'
    return (
        f'<figure class="{css}"><div class="frame">{inside}</div>'
        f"<figcaption>{caption}<br>{escape(image.building)}</figcaption></figure>"
    )

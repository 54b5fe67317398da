"""What an audit found as one HTML page: thumbnails of each doubtful photo beside those it is judged by."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from faceembed import page, report
from faceembed.plots import escape as _e

__all__ = ["AuditPage", "Case", "Group", "Part", "render", "write_page"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Photos side by side."""

    caption: str
    photos: tuple[int, ...]
    """Index of each in the source."""
    suspect: bool = False
    """These are what is doubted, not what it is judged by."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One finding."""

    title: str
    words: str
    """Why it is listed, with its numbers."""
    groups: tuple[Group, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Findings of one kind, the surest first."""

    which: str
    """Its id in the page."""
    title: str
    words: str
    """How to read it."""
    total: int
    """How many were found; `cases` may be the first of them."""
    cases: tuple[Case, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditPage:
    """What the page shows."""

    title: str
    audited: str
    """What was audited and by what, in a sentence."""
    parts: Sequence[Part]
    crops: Mapping[int, NDArray[np.uint8]]
    """Photo → uint8 RGB [s, s, 3], as the network saw it: every photo of a group."""
    keys: Sequence[str] | NDArray[np.str_]
    """[n] name of each photo of the source."""
    warnings: Sequence[str] = ()
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What was measured, name → value."""
    commands: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What each does → what to type."""


def write_page(path: str | os.PathLike[str], shown: AuditPage) -> None:
    """Writes the page as one HTML file, whole or not at all."""
    report.write_text(path, render(shown))


def render(shown: AuditPage) -> str:
    """The page as HTML: one document without scripts or a network. All text is escaped."""
    uris = {photo: page.data_uri(crop) for photo, crop in shown.crops.items()}
    warnings = "".join(f'<p class="note warning"><b>Warning.</b> {_e(text)}</p>' for text in shown.warnings)
    figures = [(part.title, f"{part.total:,}", _beneath(part)) for part in shown.parts]
    header = (
        f'<header id="top">\n<p class="over">faceembed · audit of labels</p>\n<h1>{_e(shown.title)}</h1>\n'
        f'<p class="lead">{_e(shown.audited)}</p>\n{page.tiles(figures)}\n{warnings}\n'
        '<p class="small">Nothing here is certain, and nothing was changed: look, then decide. Whoever has this page has '
        "these photos: share it as you would share them.</p>\n</header>"
    )
    sections = [page.section(part.which, part.title, _part(part, uris, shown.keys)) for part in shown.parts]
    commands = "".join(f"<h3>{_e(what)}</h3><pre>{_e(command)}</pre>" for what, command in shown.commands.items())
    facts = page.table((), [[_e(name), _e(value)] for name, value in shown.facts.items()]) if shown.facts else ""
    last = page.section(
        "provenance", "Where this comes from", commands + (f"<h3>Measured</h3>{facts}" if facts else "")
    )
    return page.document(shown.title, [header, *sections, last])


def _beneath(part: Part) -> str:
    if not part.total:
        return "none"
    return "all shown below" if len(part.cases) == part.total else f"the first {len(part.cases)} shown below"


def _part(part: Part, uris: Mapping[int, str], keys: Sequence[str] | NDArray[np.str_]) -> str:
    if not part.cases:
        return f"<p>{_e(part.words)}</p><p>None were found.</p>"
    cases = []
    for number, case in enumerate(part.cases, start=1):
        groups = "".join(_group(group, uris, keys) for group in case.groups)
        cases.append(
            f'<article class="case"><p><b>{number}. <bdi>{_e(case.title)}</bdi></b> <span>{_e(case.words)}</span></p>'
            f'<div class="groups">{groups}</div></article>'
        )
    return f"<p>{_e(part.words)}</p>{''.join(cases)}"


def _group(group: Group, uris: Mapping[int, str], keys: Sequence[str] | NDArray[np.str_]) -> str:
    images = "".join(
        f'<img src="{uris[photo]}" alt="{_e(keys[photo])}" title="{_e(keys[photo])}" width="72" height="72">'
        for photo in group.photos
    )
    kind = ' class="suspect"' if group.suspect else ""
    return f"<figure{kind}><div>{images}</div><figcaption><bdi>{_e(group.caption)}</bdi></figcaption></figure>"

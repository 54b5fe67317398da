"""What an audit found, as rows of a table, as a list of photos to leave out, and as the sections of a page."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faceembed.audit.copies import Copies, all_but_one
from faceembed.audit.labels import Ints, LabelErrors, Labels, MergedPeople
from faceembed.audit.page import Case, Group, Part
from faceembed.data.sources import Photos

PAIRS = "two photos, not one person"

COLUMNS = ("kind", "rank", "score", "photo", "person", "other_photo", "other_person", "cosine", "other_cosine")
"""Of a row of `findings`."""

BESIDE = 4
"""Photos of a folder that are shown beside a doubtful one."""


def findings(found: Labels, copies: Copies, photos: Photos) -> Iterator[dict[str, Any]]:
    """All findings as rows of a table: kind, rank in its kind, score, the photos and people concerned."""
    keys, people = photos.keys, photos.people
    errors, splits, merges = found.label_errors, found.splits, found.merges
    for kind, chosen in by_kind(errors):
        # Both photos of a folder of two share a rank: either may be the wrong one.
        folders = {person: rank for rank, person in enumerate(errors.person[one_a_folder(errors, chosen)], start=1)}
        for place, i in enumerate(chosen, start=1):
            rank = folders[errors.person[i]] if kind == PAIRS else place
            yield {
                "kind": kind, "rank": rank, "score": float(errors.margin[i]), "photo": str(keys[errors.photo[i]]),
                "person": str(people[errors.person[i]]), "other_photo": "",
                "other_person": str(people[errors.looks_like[i]]), "cosine": float(errors.own[i]),
                "other_cosine": float(errors.other[i]),
            }  # fmt: skip
    for i in range(len(splits)):
        yield {
            "kind": "one person in two folders", "rank": i + 1, "score": float(splits.score[i]), "photo": "",
            "person": str(people[splits.first[i]]), "other_photo": "", "other_person": str(people[splits.second[i]]),
            "cosine": float(splits.cosine[i]), "other_cosine": None,
        }  # fmt: skip
    for i in range(len(merges)):
        for photo in smaller_cluster(merges, photos.identity, i):
            yield {
                "kind": "two people in one folder", "rank": i + 1, "score": float(merges.score[i]),
                "photo": str(keys[photo]), "person": str(people[merges.person[i]]), "other_photo": "",
                "other_person": "", "cosine": float(merges.cosine[i]), "other_cosine": None,
            }  # fmt: skip
    for kind, across in (("copy in two folders", True), ("copy in one folder", False)):
        for rank, i in enumerate(np.flatnonzero(copies.across == across), start=1):
            one, other = copies.first[i], copies.second[i]
            yield {
                "kind": kind, "rank": rank, "score": float(copies.alike[i]), "photo": str(keys[one]),
                "person": str(people[photos.identity[one]]), "other_photo": str(keys[other]),
                "other_person": str(people[photos.identity[other]]), "cosine": None, "other_cosine": None,
            }  # fmt: skip


def by_kind(errors: LabelErrors) -> list[tuple[str, Ints]]:
    """Label errors in the order of what can be said of them: whose photo it is, nobody's of the folder, one of two."""
    return [
        ("looks like somebody else", np.flatnonzero(errors.sure & errors.somebody)),
        ("like nobody in its folder", np.flatnonzero(errors.sure & ~errors.somebody)),
        (PAIRS, np.flatnonzero(~errors.sure)),
    ]


def smaller_cluster(merges: MergedPeople, identity: NDArray[np.integer], i: int) -> Ints:
    """The photos of folder i's smaller cluster; of two equal ones the second."""
    which = 1 if merges.size[i, 1] <= merges.size[i, 0] else 0
    return np.flatnonzero((identity == merges.person[i]) & (merges.side == which))


def excluded(found: Labels, copies: Copies) -> Ints:
    """Photos that a training can do without, ascending: those in the wrong folder, and of copies in one folder all but one.

    What needs a person's decision is left in: folders of two photos, people in two folders, two in one, copies in two.
    """
    errors = found.label_errors
    return np.unique(np.concatenate([errors.photo[errors.sure], all_but_one(copies)]))


def one_a_folder(errors: LabelErrors, chosen: Ints) -> Ints:
    """Of label errors the first of each folder: of a folder of two photos, both may be listed."""
    _, first = np.unique(errors.person[chosen], return_index=True)
    return chosen[np.sort(first)]


def parts_of(found: Labels, copies: Copies, photos: Photos, most: int) -> list[Part]:
    """The page's sections: every kind of finding, its first `most` with the photos to judge it by."""
    errors, splits, merges = found.label_errors, found.splits, found.merges
    keys, people, identity = photos.keys, photos.people, photos.identity
    starts = np.searchsorted(identity, np.arange(len(people)))
    count = np.bincount(identity, minlength=len(people))

    def some(person: int, without: int = -1) -> tuple[int, ...]:
        """A few photos of a folder, evenly."""
        inside = np.setdiff1d(np.arange(starts[person], starts[person] + count[person]), [without])
        return tuple(inside[np.unique(np.linspace(0, len(inside) - 1, BESIDE).round().astype(int))].tolist())

    def folder(person: int, without: int = -1) -> Group:
        beside = some(person, without)
        total = count[person] - (without >= 0 and identity[without] == person)
        words = "the other" if without >= 0 and identity[without] == person else f"{people[person]}:"
        return Group(caption=f"{words} {_photos(total)}" if len(beside) == total else
                     f"{words} {len(beside)} of {_photos(total)}", photos=beside)  # fmt: skip

    def error(i: int) -> Case:
        photo, person, other = int(errors.photo[i]), int(errors.person[i]), int(errors.looks_like[i])
        words = f"margin {errors.margin[i]:+.3f}; cosine to its folder {errors.own[i]:.2f}"
        groups = [Group(caption=str(people[person]), photos=(photo,), suspect=True), folder(person, photo)]
        if errors.margin[i] > 0:  # the nearest other person is a hint, at least
            words += f", to {people[other]} {errors.other[i]:.2f}"
            groups.append(folder(other))
        return Case(title=str(keys[photo]), words=words, groups=tuple(groups))

    explained = {
        "looks like somebody else": "The marked photo fits its folder worse than nearly all photos do, and another "
        "person's better. To the left what is doubted, then its folder, then whom it looks like.",
        "like nobody in its folder": "The marked photo is as far from its folder as a stranger would be. A wrong label, or "
        "a profile, a child's photo, a face that was not found. To the right the nearest other person, if that is nearer.",
        PAIRS: "Folders of two photos that show two people by their embeddings: either may be the wrong one.",
    }
    parts = [
        Part(
            which=kind.replace(" ", "-").replace(",", ""), title=kind.capitalize(), words=explained[kind],
            total=len(shown), cases=tuple(error(int(i)) for i in shown[:most]),
        )
        for kind, chosen in by_kind(errors)
        for shown in [one_a_folder(errors, chosen) if kind == PAIRS else chosen]
    ]  # fmt: skip
    parts.append(
        Part(
            which="one-person-in-two-folders", title="One person in two folders", total=len(splits),
            words="Pairs of people whose photos look as alike as the two halves of one person's do. People whom the "
            "network tells apart badly come here too.",
            cases=tuple(
                Case(
                    title=f"{people[splits.first[i]]} and {people[splits.second[i]]}",
                    words=f"log-likelihood ratio {splits.score[i]:+.3f}; cosine {splits.cosine[i]:.2f}",
                    groups=(folder(int(splits.first[i])), folder(int(splits.second[i]))),
                )
                for i in range(min(most, len(splits)))
            ),
        )
    )  # fmt: skip

    def cluster(i: int, which: int) -> Group:
        inside = np.flatnonzero((identity == merges.person[i]) & (merges.side == which))
        return Group(caption=_photos(len(inside)), photos=tuple(inside[:BESIDE].tolist()))

    parts.append(
        Part(
            which="two-people-in-one-folder", title="Two people in one folder", total=len(merges),
            words="Folders whose photos fall into two groups that look like two people.",
            cases=tuple(
                Case(
                    title=str(people[merges.person[i]]),
                    words=f"log-likelihood ratio {merges.score[i]:+.3f}; cosine {merges.cosine[i]:.2f}",
                    groups=(cluster(i, 0), cluster(i, 1)),
                )
                for i in range(min(most, len(merges)))
            ),
        )
    )  # fmt: skip
    for across, title, words in (
        (True, "Copies in two folders", "One photograph under two names: one of the labels is wrong."),
        (False, "Copies in one folder", "One photograph twice, larger, smaller, cut or compressed otherwise."),
    ):
        chosen = np.flatnonzero(copies.across == across)
        parts.append(
            Part(
                which=title.lower().replace(" ", "-"), title=title, words=words, total=len(chosen),
                cases=tuple(
                    Case(
                        title=f"{keys[copies.first[i]]} and {keys[copies.second[i]]}",
                        words=f"pixels alike {copies.alike[i]:.3f}" + (", mirrored" if copies.mirrored[i] else ""),
                        groups=tuple(
                            Group(caption=str(people[identity[photo]]), photos=(int(photo),), suspect=True)
                            for photo in (copies.first[i], copies.second[i])
                        ),
                    )
                    for i in chosen[:most]
                ),
            )
        )  # fmt: skip
    return parts


def _photos(number: int) -> str:
    return "1 photo" if number == 1 else f"{number} photos"

"""Verification lists: pairs of photos, and whether they show the same person."""

import collections
import csv
import dataclasses
import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from faceembed.data import sampling, sources, splits, verification_bin
from faceembed.data.sources import Photos

LFW_PEOPLE = {"dev_train": "peopleDevTrain.txt", "dev_test": "peopleDevTest.txt"}
LFW_LISTS = {"view1_train": "pairsDevTrain.txt", "view1_test": "pairsDevTest.txt", "view2": "pairs.txt"}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Pairs of photos by key."""

    key_a: np.ndarray
    """[n] str, keys of `Photos`."""
    key_b: np.ndarray
    """[n] str."""
    same: np.ndarray
    """[n] bool, whether both show one person (genuine) or two (impostor)."""
    fold: np.ndarray | None = None
    """[n] int32, 0 to folds - 1, where the list comes in folds."""
    lost: tuple[int, int] = (0, 0)
    """Genuine and impostor pairs that were left out because photos of theirs are missing."""

    def __post_init__(self) -> None:
        lengths = {len(column) for column in (self.key_a, self.key_b, self.same, self.fold) if column is not None}
        if len(lengths) != 1:
            raise ValueError(f"columns of pairs have different lengths: {sorted(lengths)}.")

    def __len__(self) -> int:
        return len(self.same)


def load_pairs(
    spec: str,
    *,
    data_dir: Path | str | None = None,
    split: str = "report",
    n: int = 4000,
    allow_missing: bool = False,
    progress: bool = True,
    **options: Any,
) -> tuple[Pairs, Photos]:
    """The pairs a name stands for, and the photos they are of.

    Args:
      spec: "lfw:view1_train", "lfw:view1_test", "lfw:view2", "csv:FILE", "bin:FILE", "heldout:SOURCE", or
        "hard:FILE.npz@lfw:dev_test" and "hard:FILE.npz@heldout:SOURCE" (`hard_pairs`).
      data_dir: where prepared sets are kept; None is `sources.default_data_dir()`.
      split: of "heldout:" alone, whose people: train, select, calibrate or report.
      n: of "heldout:" and "hard:" alone, pairs at most.
      allow_missing: leave out pairs of photos that are not there and count them in `Pairs.lost`, instead of raising.
      progress: show a bar while the files of a folder are checked.
      **options: of "heldout:synthetic" alone, for `sources.open_source`; the draw of the pairs has no seed, so that the
        list of a source is the one that ends its training.

    Raises:
      ValueError: if there is no such list, or it takes no such options, or it is malformed (the line is named).
      FileNotFoundError: if the set is not prepared, or lacks the list.
    """
    kind, _, rest = spec.partition(":")
    directory = sources.default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    if options and kind not in ("heldout", "hard"):
        raise ValueError(f"pairs {spec!r} take no options, got {', '.join(sorted(options))}.")
    if kind == "lfw" and rest in LFW_LISTS:
        pairs, photos = _lfw(rest, directory)
        return present(pairs, photos, allow_missing=allow_missing), photos
    if kind == "csv" and rest:
        return read_csv(Path(rest).expanduser(), allow_missing=allow_missing)
    if kind == "bin" and rest:
        key_a, key_b, same, fold, photos = verification_bin.read_bin(Path(rest).expanduser())
        return Pairs(key_a=key_a, key_b=key_b, same=same, fold=fold), photos
    if kind == "hard" and ".npz@" in rest:
        # The first, since folders may have an @ in their names.
        stem, _, people = rest.partition(".npz@")
        file = f"{stem}.npz"
        photos = load_people(
            f"all:{people}", data_dir=directory, split=split, allow_missing=allow_missing, progress=progress, **options
        )
        return hard_pairs(photos, read_embeddings(Path(file).expanduser(), photos), n=n), photos
    if kind == "heldout" and rest:
        photos = sources.open_source(rest, data_dir=directory, progress=progress, **options)
        return heldout(photos, split, seed=0, n=n), photos
    known = ", ".join(f"lfw:{view}" for view in LFW_LISTS)
    raise ValueError(
        f"pairs {spec!r} is none of {known}, csv:FILE, bin:FILE, heldout:SOURCE, hard:FILE.npz@heldout:SOURCE, all:SOURCE. "
        "Try --pairs lfw:view1_test."
    )


def load_people(
    spec: str,
    *,
    data_dir: Path | str | None = None,
    split: str = "report",
    allow_missing: bool = False,
    progress: bool = True,
    **options: Any,
) -> Photos:
    """The photos of a protocol in which every one meets every other.

    Args:
      spec: "all:lfw:dev_test" or "all:lfw:dev_train" (LFW's people lists of View 1), "all:heldout:SOURCE" (people of
        `split`), or "all:SOURCE".
      data_dir, split, progress, **options: as `load_pairs`.
      allow_missing: go on without people and photos that a list names and that are not there.

    Raises:
      ValueError: there is no such protocol, or the photos are not those of the list.
      FileNotFoundError: the set is not prepared, or lacks the list.
    """
    directory = sources.default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    kind, _, rest = spec.partition(":")
    if kind != "all" or not rest:
        raise ValueError(
            f"{spec!r} is no protocol of all pairs. Try all:lfw:dev_test, all:heldout:SOURCE or all:SOURCE."
        )
    if rest.startswith("lfw:"):
        view = rest.removeprefix("lfw:")
        if view not in LFW_PEOPLE:
            known = ", ".join(f"all:lfw:{name}" for name in LFW_PEOPLE)
            raise ValueError(f"{spec!r} is none of {known}.")
        if options:
            raise ValueError(f"{spec!r} takes no options, got {', '.join(sorted(options))}.")
        return _lfw_people(view, directory, allow_missing)
    held_out = rest.startswith("heldout:")
    photos = sources.open_source(rest.removeprefix("heldout:"), data_dir=directory, progress=progress, **options)
    if not held_out:
        return photos
    if split not in splits.SHARES:
        raise ValueError(f"split is {split!r}: expected one of {', '.join(splits.SHARES)}.")
    return sources.select(photos, (splits.split_of(photos.people) == split)[photos.identity])


def _lfw_people(view: str, data_dir: Path, allow_missing: bool) -> Photos:
    photos = sources.open_source("lfw", data_dir=data_dir)
    path = data_dir / "lfw" / LFW_PEOPLE[view]
    if not path.is_file():
        raise FileNotFoundError(_lacks(path))
    names, counts, _ = read_lfw_people(path)
    number = dict(zip(photos.people.tolist(), np.bincount(photos.identity).tolist(), strict=True))
    there = np.array([number.get(name, 0) for name in names.tolist()], np.int64)
    more = [f"{names[i]} ({there[i]} for {counts[i]})" for i in np.flatnonzero(there > counts)]
    if more:
        raise ValueError(
            f"lfw has more photos of {len(more)} people than {path.name} lists: {_named(more)}. It is the list of another "
            "set of photos."
        )
    missing = [f"{names[i]} ({counts[i] - there[i]} of {counts[i]})" for i in np.flatnonzero(there < counts)]
    if missing and not allow_missing:
        raise ValueError(
            f"{path.name} names photos of {len(missing)} people that lfw lacks: {_named(missing)}. Prepare lfw again from "
            "the whole archive, or go on without them: --allow-missing."
        )
    if not there.any():
        raise ValueError(f"lfw has no photo of the {len(names)} people in {path.name}: nobody is left.")
    chosen = sources.select(photos, np.isin(photos.people, names)[photos.identity])
    if not missing:
        return chosen
    listed, kept = number_of_pairs(counts), number_of_pairs(there)
    lost = sources.Problem(
        path=f"{path}: {missing[0]}",
        reason=f"people with photos missing: {len(missing):,} people, and {listed[0] - kept[0]:,} genuine and "
        f"{listed[1] - kept[1]:,} impostor pairs were left out",
    )
    return dataclasses.replace(chosen, problems=(*chosen.problems, lost))


def number_of_pairs(counts: np.ndarray) -> tuple[int, int]:
    """Genuine and impostor pairs of people with so many photos each."""
    n = counts.astype(np.int64)
    genuine = int((n * (n - 1) // 2).sum())
    return genuine, int(n.sum() * (n.sum() - 1) // 2) - genuine


def _named(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def present(pairs: Pairs, photos: Photos, *, allow_missing: bool) -> Pairs:
    """The pairs whose photos are there, with the number of those that are lost.

    Raises:
      ValueError: naming photos that are missing, unless they may be; or all pairs of a kind are lost.
    """
    there = [np.isin(side, photos.keys) for side in (pairs.key_a, pairs.key_b)]
    kept = there[0] & there[1]
    if kept.all():
        return pairs
    if not allow_missing:
        missing = sorted({*pairs.key_a[~there[0]].tolist(), *pairs.key_b[~there[1]].tolist()})
        raise ValueError(
            f"{len(missing)} photos of the pairs are not in {photos.source}: {_named(missing)}. The list and the photos "
            f"must be of one set; see python launch.py data info {photos.source} for what was left out. To go on without "
            f"{int((~kept).sum())} pairs: --allow-missing."
        )
    if not (pairs.same & kept).any() or not (~pairs.same & kept).any():
        raise ValueError(
            f"of {len(pairs)} pairs {int(kept.sum())} have both photos in {photos.source}: too few to compare."
        )
    return Pairs(
        key_a=pairs.key_a[kept],
        key_b=pairs.key_b[kept],
        same=pairs.same[kept],
        fold=None if pairs.fold is None else pairs.fold[kept],
        lost=(pairs.lost[0] + int((pairs.same & ~kept).sum()), pairs.lost[1] + int((~pairs.same & ~kept).sum())),
    )


def used(pairs: Pairs, photos: Photos) -> np.ndarray:
    """[photos] bool, which photos are in some pair."""
    return np.isin(photos.keys, np.concatenate([pairs.key_a, pairs.key_b]))


def resolve(pairs: Pairs, photos: Photos) -> tuple[np.ndarray, np.ndarray]:
    """Where each pair's photos are.

    Returns:
      (index_a, index_b): [n] int32 into `photos`.

    Raises:
      ValueError: naming keys that `photos` does not have, or a pair whose `same` contradicts the photos' people.
    """
    wanted = {*pairs.key_a.tolist(), *pairs.key_b.tolist()}
    place = sources.located(wanted, photos)
    missing = sorted(wanted - place.keys())
    if missing:
        shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise ValueError(
            f"{len(missing)} photos of the pairs are not in {photos.source}: {shown}. The list and the photos must be "
            f"of one set; see python launch.py data info {photos.source} for what was left out."
        )
    a, b = (np.array([place[str(key)] for key in keys], np.int32) for keys in (pairs.key_a, pairs.key_b))
    wrong = np.flatnonzero((photos.identity[a] == photos.identity[b]) != pairs.same)
    if len(wrong):
        first = wrong[0]
        raise ValueError(
            f"{len(wrong)} pairs contradict {photos.source}, first {pairs.key_a[first]} and {pairs.key_b[first]}: the "
            f"list says {'the same person' if pairs.same[first] else 'two people'}. Is it the list of another set?"
        )
    return a, b


def heldout(photos: Photos, split: str, *, seed: int = 0, n: int = 4000, cap: int = 10) -> Pairs:
    """As many genuine as impostor pairs among people of one part of the split.

    People are weighted, not pairs: in turn everybody gives a genuine pair, then everybody who can gives a second, up to
    `cap`, so that nobody with hundreds of photos dominates. Impostor pairs go round in the same way: in each round
    everybody is paired with somebody drawn anew. No pair comes twice.

    Args:
      photos: any.
      split: "train", "select", "calibrate" or "report"; see `splits.split_of`.
      seed: decides the draw.
      n: pairs at most; fewer come where the people have no more.
      cap: genuine pairs of one person at most.

    Raises:
      ValueError: if the part has no genuine or no impostor pair.
    """
    if split not in splits.SHARES:
        raise ValueError(f"split is {split!r}: expected one of {', '.join(splits.SHARES)}.")
    people = np.flatnonzero(splits.split_of(photos.people) == split)
    begin = np.searchsorted(photos.identity, people)
    count = np.searchsorted(photos.identity, people, side="right") - begin
    code = _codes(photos.people[people])
    genuine = _genuine_in_turn(begin, count, code, seed=seed, cap=cap, most=n // 2)

    # A few rounds beyond what is needed find the last unused pairs of a small set.
    impostor: dict[tuple[int, int], None] = {}
    rounds = 2 * len(genuine) // max(1, len(people) // 2) + 20
    for turn in range(rounds if len(people) > 1 else 0):
        around = np.argsort(sampling.draw(seed, 12, turn, code), kind="stable")
        photo = begin + (sampling.draw(seed, 13, turn, code) % count.astype(np.uint64)).astype(np.int64)
        half = len(around) // 2
        for a, b in zip(photo[around[:half]], photo[around[half : 2 * half]], strict=True):
            impostor[int(min(a, b)), int(max(a, b))] = None
        if len(impostor) >= len(genuine):
            break

    number = min(len(genuine), len(impostor))
    if not number:
        raise ValueError(
            f"{split} people of {photos.source} make no balanced pairs: {len(people)} people, {int((count > 1).sum())} "
            "of them with two photos or more. A larger set is needed."
        )
    chosen = np.array(genuine[:number] + list(impostor)[:number])
    return Pairs(
        key_a=photos.keys[chosen[:, 0]], key_b=photos.keys[chosen[:, 1]], same=np.arange(2 * number) < number
    )  # fmt: skip


def _codes(names: np.ndarray) -> np.ndarray:
    """Draws follow from names, not places: a source and the part of it that is tested give the same list."""
    return np.array([int(hashlib.sha256(str(name).encode()).hexdigest()[:16], 16) for name in names], np.uint64)


def _genuine_in_turn(
    begin: np.ndarray, count: np.ndarray, code: np.ndarray, *, seed: int, cap: int, most: int
) -> list[tuple[int, int]]:
    """Everybody's first genuine pair, then everybody's second, up to `cap` and `most` in all; each person's are drawn."""
    place = sampling.draw(seed, 11, code)
    several = np.flatnonzero(count > 1)
    # Who is not among the first `most` of the first turn gives none: a person's pairs are many, and not listed in vain.
    several = several[np.argsort(place[several], kind="stable")[:most]]
    turns: list[tuple[int, int, int, int]] = []  # (turn, order within it, photo, photo)
    for person in several:
        i, j = np.triu_indices(count[person], 1)
        pick = np.argsort(sampling.draw(seed, 10, code[person], i, j), kind="stable")[:cap]
        order = int(place[person])
        turns += [
            (turn, order, int(begin[person] + i[pair]), int(begin[person] + j[pair])) for turn, pair in enumerate(pick)
        ]
    return [(a, b) for _, _, a, b in sorted(turns)[:most]]


PARTNERS = 32
"""People nearest to somebody who are tried as the other side of their hard pairs."""


def hard_pairs(photos: Photos, embedding: np.ndarray, *, seed: int = 0, n: int = 4000, cap: int = 10) -> Pairs:
    """Impostor pairs that another encoder finds most alike, balanced over people; genuine pairs as in `heldout`.

    Random impostors are easy, and the errors that matter are made among look-alikes. Were they chosen by the encoder that
    is tested, the list would hold its own errors and be unfair to it alone: give the embeddings of an INDEPENDENT one. In
    turn everybody takes the photo nearest to one of theirs that is of somebody else who has not yet `cap` pairs, each
    couple of people once. Genuine pairs are drawn, since a person's photos least alike to an encoder may be wrong labels.

    Args:
      photos: whose people are paired.
      embedding: [photos, d] of these photos by the independent encoder.
      seed: of the genuine pairs and of who is first.
      n: pairs at most.
      cap: pairs of one person at most, of each kind; impostor pairs count on both sides.

    Returns:
      As many genuine as impostor pairs, none twice, no two impostor pairs of the same two people.

    Raises:
      ValueError: the embedding has other rows than photos, or there is no genuine or impostor pair.
    """
    emb = np.asarray(embedding, np.float32)
    if emb.ndim != 2 or len(emb) != len(photos):
        raise ValueError(f"embedding has shape {emb.shape} for {len(photos)} photos: give one row a photo.")
    people = np.arange(len(photos.people))
    begin = np.searchsorted(photos.identity, people)
    count = np.bincount(photos.identity, minlength=len(people))
    code = _codes(photos.people)
    genuine = _genuine_in_turn(begin, count, code, seed=seed, cap=cap, most=n // 2)

    length = np.linalg.norm(emb, axis=1, keepdims=True)
    if not np.isfinite(emb).all() or not length.all():
        raise ValueError("embedding has rows that are not finite or all zero: embed the photos again.")
    emb = emb / length
    choices: list[
        list[tuple[int, int, int]]
    ] = []  # of each person: (other person, own photo, other's photo), nearest first
    for person in people.tolist():
        own = emb[begin[person] : begin[person] + count[person]] @ emb.T
        nearest = own.max(axis=0)
        nearest[begin[person] : begin[person] + count[person]] = -np.inf
        best = np.maximum.reduceat(nearest, begin)
        found = []
        for other in np.argsort(-best, kind="stable")[: min(PARTNERS, len(people) - 1)].tolist():
            photo = begin[other] + int(np.argmax(nearest[begin[other] : begin[other] + count[other]]))
            found.append((other, int(begin[person] + np.argmax(own[:, photo])), int(photo)))
        choices.append(found)
    impostor: dict[tuple[int, int], tuple[int, int]] = {}
    taken = np.zeros(len(people), np.int64)
    order = np.argsort(sampling.draw(seed, 14, code), kind="stable").tolist()
    for _ in range(cap):
        for person in order:
            if taken[person] >= cap:
                continue
            for other, own_photo, photo in choices[person]:
                couple = min(person, other), max(person, other)
                if taken[other] < cap and couple not in impostor:
                    impostor[couple] = min(own_photo, photo), max(own_photo, photo)
                    taken[[person, other]] += 1
                    break
        if len(impostor) >= len(genuine):
            break
    number = min(len(genuine), len(impostor))
    if not number:
        raise ValueError(
            f"{photos.source} makes no balanced pairs: {len(people)} people, {int((count > 1).sum())} of them with two "
            "photos or more. A larger set is needed."
        )
    chosen = np.array(genuine[:number] + list(impostor.values())[:number])
    return Pairs(
        key_a=photos.keys[chosen[:, 0]], key_b=photos.keys[chosen[:, 1]], same=np.arange(2 * number) < number
    )  # fmt: skip


def read_embeddings(path: Path, photos: Photos, *, checkpoint: str | None = None) -> np.ndarray:
    """[photos, d] embeddings from a file of `launch.py embed`, in the order of the photos.

    Args:
      path: the .npz file.
      photos: of the same source.
      checkpoint: fingerprint of the one that must have made them; not looked at in files that do not tell.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is another kind of file, or names a photo twice, or lacks photos, which are named; or another
        checkpoint made it.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: make it with python launch.py embed CHECKPOINT SOURCE --out {path}."
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            embedding, key = file["embedding"], file["key"]
            maker = str(file["checkpoint"]) if "checkpoint" in file else None
    # TypeError is what an .npy file under this name gives: an array is nothing to open.
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a file of launch.py embed (embedding, key): {error}.") from error
    if checkpoint is not None and maker is not None and maker != checkpoint:
        raise ValueError(
            f"{path} was made by another checkpoint (fingerprint {maker[:12]}…, expected {checkpoint[:12]}…): name the one "
            "that made it, or embed the source again."
        )
    if embedding.dtype.kind != "f":
        raise ValueError(f"{path}: embedding is {embedding.dtype}: expected floats.")
    if embedding.ndim != 2 or key.shape != embedding.shape[:1]:
        raise ValueError(f"{path}: embedding has shape {embedding.shape} and key {key.shape}: expected a key a row.")
    place = {str(name): row for row, name in enumerate(key)}
    if len(place) != len(key):
        twice = sorted(name for name, times in collections.Counter(map(str, key)).items() if times > 1)
        raise ValueError(f"{path} has {len(twice)} keys more than once: {_named(twice)}. Embed the source again.")
    missing = [str(name) for name in photos.keys if str(name) not in place]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of the {len(photos)} photos of {photos.source}: {_named(missing)}. It must be of "
            "the same source."
        )
    return embedding[[place[str(name)] for name in photos.keys]]


def read_metadata(path: Path) -> dict[str, dict[str, str]]:
    """What a user knows of photos or people: a csv with a column `key` or `person`, and a column an attribute.

    Returns:
      attribute → photo key or person → value; empty cells are left out. "key" or "person" itself says which under "".

    Raises:
      ValueError: neither or both of the columns are there, or no other, or two of one name, or a line names somebody
        twice, or has another number of cells.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        rows = list(reader)
    by = [name for name in ("key", "person") if name in columns]
    attributes = [name for name in columns if name not in ("key", "person")]
    if len(by) != 1 or not attributes or "" in columns or len(set(columns)) != len(columns):
        raise ValueError(
            f"{path}, line 1: columns are {', '.join(columns) or 'none'}; expected key (of photos) or person, and "
            "attributes, each with a name of its own."
        )
    found: dict[str, dict[str, str]] = {"": {"by": by[0]}, **{name: {} for name in attributes}}
    seen: set[str] = set()
    for line, row in enumerate(rows, 2):
        name = row[by[0]] or ""
        if not name or name in seen:
            raise ValueError(f"{path}, line {line}: {by[0]} is {name!r}: " + ("given before." if name else "empty."))
        seen.add(name)
        # csv gives cells beyond the columns under None, and None for those that a line lacks.
        if None in row or None in row.values():
            raise ValueError(f"{path}, line {line}: expected {len(columns)} cells. Put values with commas in quotes.")
        for attribute in attributes:
            value = (row[attribute] or "").strip()
            if value:
                found[attribute][name] = value
    return found


def slices(pairs: Pairs, photos: Photos, metadata: dict[str, dict[str, str]]) -> dict[str, np.ndarray]:
    """Pairs within each value of each attribute: those of which both photos (or people) have it.

    Args:
      pairs, photos: the tested ones.
      metadata: of `read_metadata`.

    Returns:
      "attribute=value" → [n] bool, in order; values without a pair are left out.

    Raises:
      ValueError: no photo of the pairs has an attribute: the file is of another set.
    """
    first, second = resolve(pairs, photos)
    by_person = metadata[""]["by"] == "person"
    names = photos.people[photos.identity] if by_person else photos.keys
    masks: dict[str, np.ndarray] = {}
    for attribute, values in metadata.items():
        if not attribute:
            continue
        value = np.array([values.get(str(name), "") for name in names], str)
        sides = value[first], value[second]
        for one in sorted(set(value.tolist()) - {""}):
            mask = (sides[0] == one) & (sides[1] == one)
            if mask.any():
                masks[f"{attribute}={one}"] = mask
    if not masks:
        raise ValueError(
            f"no pair has both sides in the metadata: its column {metadata['']['by']!r} names none of the photos of "
            f"{photos.source}, such as {names[0]}."
        )
    return masks


def read_lfw_pairs(path: Path) -> Pairs:
    """LFW's pairs files.

    View 1 (pairsDevTrain.txt, pairsDevTest.txt): a count N, then N genuine lines `name i j` and N impostor lines
    `name1 i name2 j`. View 2 (pairs.txt): `folds N`, then the same for each fold.

    Raises:
      ValueError: naming the line that does not fit.
    """
    lines = [line.split() for line in path.read_text().splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    head = lines[0] if lines else []
    if len(head) not in (1, 2) or not all(word.isdigit() for word in head):
        raise ValueError(f"{path}, line 1: {' '.join(head)!r} is no count: expected N (View 1), or FOLDS N (View 2).")
    folds, number = (1, int(head[0])) if len(head) == 1 else (int(head[0]), int(head[1]))
    if len(lines) != 1 + 2 * folds * number:
        raise ValueError(
            f"{path} has {len(lines) - 1} pairs where line 1 promises {2 * folds * number}. Was it cut off? "
            "Get it again."
        )
    keys: list[tuple[str, str]] = []
    same = np.arange(2 * folds * number) // number % 2 == 0
    for line_number, (words, genuine) in enumerate(zip(lines[1:], same, strict=True), 2):
        form = "name i j" if genuine else "name1 i name2 j"
        if len(words) != len(form.split()) or not all(word.isdigit() for word in (words[1], words[-1])):
            raise ValueError(f"{path}, line {line_number}: {' '.join(words)!r} is not of the form {form}.")
        keys.append((_lfw_key(words[0], words[1]), _lfw_key(words[-2] if not genuine else words[0], words[-1])))
    a, b = np.array(keys, str).reshape(-1, 2).T
    fold = np.repeat(np.arange(folds, dtype=np.int32), 2 * number) if len(head) == 2 else None
    return Pairs(key_a=a, key_b=b, same=same, fold=fold)


def read_lfw_people(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """LFW's people lists: a count, then `name photos` lines; View 2's people.txt has folds of that.

    Returns:
      (people [m] str, photos of each [m] int32, fold [m] int32 or None).

    Raises:
      ValueError: naming the line that does not fit.
    """
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]

    def number(at: int) -> int:
        if at >= len(lines) or len(lines[at]) != 1 or not lines[at][0].isdigit():
            found = " ".join(lines[at]) if at < len(lines) else "the end of the file"
            raise ValueError(f"{path}, line {at + 1}: found {found!r} where a count of people is due.")
        return int(lines[at][0])

    # people.txt: the number of folds, then each fold's own count and people.
    in_folds = len(lines) > 1 and len(lines[1]) == 1
    folds, at = (number(0), 1) if in_folds else (1, 0)
    people: list[str] = []
    photos: list[int] = []
    fold: list[int] = []
    for part in range(folds):
        size = number(at)
        for line in range(at + 1, at + 1 + size):
            if line >= len(lines) or len(lines[line]) != 2 or not lines[line][1].isdigit():
                found = " ".join(lines[line]) if line < len(lines) else "the end of the file"
                raise ValueError(f"{path}, line {line + 1}: found {found!r} where a name and its count are due.")
            people.append(lines[line][0])
            photos.append(int(lines[line][1]))
            fold.append(part)
        at += 1 + size
    if at != len(lines):
        raise ValueError(f"{path}, line {at + 1}: {len(lines) - at} lines more than the counts promise.")
    return np.array(people, str), np.array(photos, np.int32), np.array(fold, np.int32) if in_folds else None


def read_csv(path: Path, *, allow_missing: bool = False) -> tuple[Pairs, Photos]:
    """A list of one's own: columns a, b (image files, relative to the list) and same (1 or 0), and fold if wanted.

    Columns person_a and person_b name the people. Without them, who is who follows from the pairs: photos joined by
    genuine pairs, directly or through others, show one person, who is called after a photo (`Photos.named` is False).

    Raises:
      ValueError: naming the line that does not fit or contradicts itself or another, or an impostor pair whose photos
        are joined.
      FileNotFoundError: naming images that are not there.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        rows = list(reader)
    if not {"a", "b", "same"} <= set(columns):
        raise ValueError(
            f"{path}, line 1: columns are {', '.join(columns)}; expected a,b,same (and fold; person_a,person_b)."
        )
    named = "person_a" in columns
    if named != ("person_b" in columns):
        raise ValueError(f"{path}, line 1: columns are {', '.join(columns)}; person_a and person_b come together.")
    if not rows:
        raise ValueError(f"{path} has no pair: expected lines like anna/1.jpg,anna/2.jpg,1.")
    same, fold = [], []
    leader: dict[str, str] = {}
    name_of: dict[str, tuple[str, int]] = {}

    def lead(key: str) -> str:
        leader.setdefault(key, key)
        while leader[key] != key:
            leader[key] = leader[leader[key]]
            key = leader[key]
        return key

    for line, row in enumerate(rows, 2):
        truth = {"1": True, "true": True, "0": False, "false": False}.get((row["same"] or "").strip().lower())
        if truth is None or not row["a"] or not row["b"]:
            raise ValueError(
                f"{path}, line {line}: same is {row['same']!r} and the photos {row['a']!r} and {row['b']!r}; expected "
                "two files, and 1 (same person) or 0."
            )
        if "fold" in columns and not (row["fold"] or "").isdigit():
            raise ValueError(f"{path}, line {line}: fold is {row['fold']!r}: expected 0, 1, ….")
        for photo, column in (("a", "person_a"), ("b", "person_b")) if named else ():
            name = (row[column] or "").strip()
            known, where = name_of.setdefault(row[photo], (name, line))
            if not name or name != known:
                told = f"{row[photo]} is {known} in line {where}" if name else "expected a name"
                raise ValueError(f"{path}, line {line}: {column} is {name!r}: {told}.")
        if named and truth != (name_of[row["a"]][0] == name_of[row["b"]][0]):
            raise ValueError(
                f"{path}, line {line}: same is {row['same']!r}, but the people are {row['person_a']!r} and "
                f"{row['person_b']!r}."
            )
        same.append(truth)
        fold.append(int(row["fold"]) if "fold" in columns else 0)
        first, second = sorted((lead(row["a"]), lead(row["b"])))
        if truth:
            leader[second] = first
    for line, (row, truth) in enumerate(zip(rows, same, strict=True), 2):
        if not truth and lead(row["a"]) == lead(row["b"]):
            raise ValueError(
                f"{path}, line {line}: {row['a']} and {row['b']} are two people here, but genuine pairs join them."
            )
    missing = [key for key in leader if not (path.parent / key).is_file()]
    if missing and not allow_missing:
        raise FileNotFoundError(
            f"{path}: no such image beside it: {_named(missing)}. To go on without their pairs: --allow-missing."
        )
    gone = set(missing)
    there = [key for key in leader if key not in gone]
    _, keys, identity, people = sources.arrange(there, [name_of[key][0] if named else lead(key) for key in there])
    pairs = Pairs(
        key_a=np.array([row["a"] for row in rows], str),
        key_b=np.array([row["b"] for row in rows], str),
        same=np.array(same, bool),
        fold=np.array(fold, np.int32) if "fold" in columns else None,
    )

    def read(index: int) -> np.ndarray:
        try:
            return sources.decode((path.parent / str(keys[index])).read_bytes())
        except ValueError as error:
            raise ValueError(f"{path.parent / str(keys[index])} does not decode: {error}.") from error

    photos = Photos(
        source=f"csv:{path}",
        keys=keys,
        identity=identity,
        people=people,
        read=read,
        square=None,
        problems=(),
        fingerprint=sources.fingerprint_of(keys, people, path.read_text()),
        named=named,
    )
    return present(pairs, photos, allow_missing=allow_missing), photos


def _lfw(view: str, data_dir: Path) -> tuple[Pairs, Photos]:
    photos = sources.open_source("lfw", data_dir=data_dir)
    path = data_dir / "lfw" / LFW_LISTS[view]
    if not path.is_file():
        raise FileNotFoundError(_lacks(path))
    return read_lfw_pairs(path), photos


def _lacks(path: Path) -> str:
    return (
        f"lfw was prepared without {path.name}. Get it from LFW's site and copy it to {path.parent}, or prepare again with "
        "python launch.py data prepare lfw --pairs-dir FOLDER --overwrite."
    )


def _lfw_key(name: str, number: str) -> str:
    return f"{name}/{name}_{int(number):04d}"

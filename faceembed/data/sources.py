"""Where photos come from: every source gives the same `Photos`.

celeba | lfw      prepared once by `launch.py data prepare NAME`, read from array_record
prepared:NAME     a set of InsightFace's that `launch.py data prepare insightface` wrote, read from array_record
insightface:PATH  InsightFace's train.rec as it is
folder:PATH       one folder a person, any image Pillow reads
synthetic         procedural identities, rendered when first read
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from faceembed import report
from faceembed.preprocess import Square, framed_square

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""Files with these endings are photos; others in a folder of photos are reported."""

UNFRAMED = ("folder:", "csv:")
"""Sources that do not know where the face is in their photos."""

CARD, JOURNAL = "align.json", "align.jsonl"
"""In a folder that `launch.py align` wrote: its settings and counts; what was found in each photo."""

MOST_PIXELS = 80_000_000
"""Of a photo as a camera took it; to decode so many takes about a gigabyte."""

MOST_IN_RECORD = 2048 * 2048
"""Pixels of a photo in a training set's record or in a list for verification, which holds crops of a hundred or some
hundreds of pixels: many threads decode them at once, and whoever made the file can make a few bytes stand for any size."""

_CHUNK = 2**16
"""Keys handled at once: Python's strings take several times the memory of an array's."""

_ONE_PHOTO = "one photo: kept, serves as a negative"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Something met while photos were gathered, and how it was dealt with."""

    path: str
    """File, folder or member of an archive (ARCHIVE:MEMBER)."""
    reason: str
    """What it is, and after a colon, what was done about it; problems of one kind are equal up to the colon."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Photos:
    """Photos of people, sorted by person and key."""

    source: str
    """As given to `open_source`, such as "celeba" or "folder:/photos"."""
    keys: np.ndarray
    """[n] str, unique: "Aaron_Eckhart/Aaron_Eckhart_0001"."""
    identity: np.ndarray
    """[n] int32, index into `people`, ascending."""
    people: np.ndarray
    """[m] str, sorted, unique."""
    read: Callable[[int], np.ndarray]
    """Index of a photo → uint8 RGB [h, w, 3]. Pure; may be called from many threads."""
    square: Square | Callable[[int], Square] | None
    """Where the face is: in every photo, or by the photo's width in pixels; None is the largest centred square."""
    problems: tuple[Problem, ...]
    """Everything that was left out, or kept though odd."""
    fingerprint: str
    """SHA-256 of keys, people and contents (of the options for a rendered source)."""
    named: bool = True
    """Whether `people` are names that other sources may share; False where they only tell people apart."""
    template: str | None = None
    """The `Preprocess.template` that the photos are already cut to; None for photos as they were taken."""
    tally: Any = None
    """What the detector found in the photos read so far (`crops.Tally`), where they are aligned as they are read."""

    def __len__(self) -> int:
        return len(self.keys)

    def square_in(self, width: int) -> Square | None:
        """`square` of a photo of this width."""
        return self.square(width) if callable(self.square) else self.square


def open_source(source: str, *, data_dir: Path | str | None = None, progress: bool = True, **options: Any) -> Photos:
    """Opens a source of photos.

    Args:
      source: "celeba", "lfw", "synthetic", "folder:PATH", "insightface:PATH" (a .rec, or the folder of train.rec) or
        "prepared:NAME".
      data_dir: where prepared sets are kept; None is `default_data_dir()`.
      progress: show a bar while the files of a folder are checked, or the labels of a .rec are read.
      **options: of "synthetic" alone: people, photos (of each), seed, size (pixels).

    Raises:
      ValueError: if there is no such source, or it takes no such options, or a folder has no photos, or a .rec is
        damaged.
      FileNotFoundError: if the set is not prepared yet, or the folder or file is not there.
    """
    name, colon, path = source.partition(":")
    form = next((form for form in SOURCES if form.partition(":")[:2] == (name, colon)), None)
    if form is None or (colon and not path):
        raise ValueError(f"source {source!r} is not one of {', '.join(SOURCES)}. Try --data.source synthetic.")
    if options and form != "synthetic":
        raise ValueError(f"source {source!r} takes no options, got {', '.join(sorted(options))}.")
    directory = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    if form in ("folder:PATH", "insightface:PATH"):
        options = {"progress": progress}
    return SOURCES[form](source, directory, **options)


def require_outside(source: str, out: Path) -> None:
    """Refuses to write among the photos of "folder:PATH".

    Raises:
      ValueError: `out` lies in PATH.
    """
    kind, _, root = source.partition(":")
    if kind == "folder" and out.resolve().is_relative_to(Path(root).expanduser().resolve()):
        raise ValueError(f"{out} lies in {root}: the next time it would be taken for a person's photos. Name another.")


def select(photos: Photos, chosen: np.ndarray) -> Photos:
    """Only some photos; people without any are dropped and the others numbered anew.

    Args:
      photos: any.
      chosen: [n] bool, which to keep; or [k] int, their numbers, ascending and none twice.
    """
    kept = chosen = np.asarray(chosen)
    if chosen.dtype == bool:
        if chosen.shape != photos.keys.shape:
            raise ValueError(f"chosen is bool {chosen.shape}: expected bool [{len(photos)}], one for each photo.")
        kept = np.flatnonzero(chosen)
    elif (
        chosen.ndim != 1
        or chosen.dtype.kind not in "iu"
        or (np.diff(chosen, prepend=-1, append=len(photos)) <= 0).any()
    ):
        raise ValueError(
            f"chosen is {chosen.dtype} {chosen.shape}: expected bool [{len(photos)}], or ascending numbers of these photos."
        )
    owner = photos.identity[kept]
    present = np.zeros(len(photos.people), bool)
    present[owner] = True
    number = np.cumsum(present, dtype=np.int32) - np.int32(1)
    read, keys, names = photos.read, photos.keys[kept], photos.people[present]
    return dataclasses.replace(
        photos,
        keys=keys,
        identity=number[owner],
        people=names,
        read=lambda index: read(int(kept[index])),
        fingerprint=fingerprint_of(keys, names, photos.fingerprint),
    )


def read_keys(path: Path | str) -> list[str]:
    """The lines of a file that names photos, a key a line; what `named` takes.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no text.
    """
    try:
        # Not as a text file: a name may hold any line break but this one.
        return Path(path).expanduser().read_bytes().decode("utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"there is no file {path} of photos to leave out. Make it with python launch.py data audit SOURCE."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} does not read as text ({error}): expected a photo's key a line.") from error


def located(keys: Iterable[str], photos: Photos) -> dict[str, int]:
    """key → the photo's number, of those keys that the photos have."""
    wanted = set(keys)
    found: dict[str, int] = {}
    # They are looked for in the photos' and not the other way: a dictionary of ten million keys takes 1.3 GB.
    for start in range(0, len(photos) if wanted else 0, _CHUNK):
        some = photos.keys[start : start + _CHUNK].tolist()
        if not wanted.isdisjoint(some):
            found |= {key: start + index for index, key in enumerate(some) if key in wanted}
    return found


def named(lines: Sequence[str], photos: Photos, path: Path | str) -> np.ndarray:
    """[n] bool: which photos the lines of a file name; empty lines do not count.

    Raises:
      ValueError: a line is no key of these photos: the first is told with its number.
    """
    place = located([*lines, *(line.removesuffix("\r") for line in lines)], photos)
    found = np.zeros(len(photos), bool)
    unknown = []
    for number, line in enumerate(lines, start=1):
        key = line if line in place else line.removesuffix("\r")
        if key in place:
            found[place[key]] = True
        elif key.strip():
            unknown.append((number, key))
    if unknown:
        number, key = unknown[0]
        raise ValueError(
            f"{path}: {len(unknown):,} lines are no photos of {photos.source}, first line {number}: {key!r}. A key looks "
            f"like {str(photos.keys[0])!r}; was the file made for another source?"
        )
    return found


def framed(photos: Photos, framing: str) -> Photos:
    """Photos of "folder:" or "csv:" with the face where a named framing has it.

    Args:
      photos: of any sizes.
      framing: a name in `preprocess.FRAMINGS`.

    Raises:
      ValueError: if the source brings its own square, or there is no such framing.
    """
    if not photos.source.startswith(UNFRAMED):
        raise ValueError(
            f"--framing {framing} is for {' and '.join(UNFRAMED)} photos: {photos.source} brings its own square. "
            "Leave --framing out."
        )
    if photos.template is not None:
        raise ValueError(
            f"--framing {framing} is for photos as they were taken, and {photos.source} holds crops of the template "
            f"{photos.template!r}. Leave --framing out."
        )
    framed_square(framing, 1)  # an unknown name is told here, not by the first photo that is cropped
    return dataclasses.replace(photos, square=functools.partial(framed_square, framing))


def default_data_dir() -> Path:
    """Where prepared sets are kept unless told: $FACEEMBED_DATA, else ~/.cache/faceembed/data."""
    return Path(os.environ.get("FACEEMBED_DATA") or "~/.cache/faceembed/data").expanduser()


def decode(data: bytes, *, most: int = MOST_PIXELS) -> np.ndarray:
    """An encoded image as uint8 RGB [h, w, 3], turned upright as its EXIF orientation says.

    Args:
      data: the bytes of a file.
      most: pixels; a larger image is refused before memory is taken for it.

    Raises:
      ValueError: if the bytes are no image, or one that is corrupt, cut off or too large.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > most:
                raise ValueError(f"{image.width}×{image.height} pixels, and {most:,} are the most; make it smaller")
            if image.mode[0] in "IF":
                # Pillow would clip it to white instead of scaling it.
                raise ValueError(f"{image.mode} pixels of more than 8 bits; save it as 8-bit RGB")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except MemoryError:
        raise  # the machine's trouble: of an image of so few pixels it says nothing
    # On damaged files Pillow raises all kinds, of every module that it reads with: struct.error, zlib.error, …
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def fingerprint_of(keys: np.ndarray, people: np.ndarray, content: str) -> str:
    """SHA-256 hex digest of keys [n], people [m] and whatever pins the contents."""
    digest = hashlib.sha256(content.encode() + b"\0\1")
    for part in (keys, people):
        for start in range(0, len(part), _CHUNK):
            digest.update("\0".join([*part[start : start + _CHUNK].tolist(), ""]).encode())
        digest.update(b"\1")
    return digest.hexdigest()


def arrange(keys: Sequence[str], owners: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sorts photos by person and key, and numbers the people.

    Args:
      keys: [n] str, unique.
      owners: [n] str, the person of each.

    Returns:
      (order [n] int64, keys [n] str, identity [n] int32, people [m] str), the last three sorted.
    """
    order = np.array(sorted(range(len(keys)), key=lambda index: (owners[index], keys[index])), np.int64)
    people, identity = np.unique(np.array(owners, str)[order], return_inverse=True)
    return order, np.array(keys, str)[order], identity.astype(np.int32), people


def lonely(identity: np.ndarray, people: np.ndarray, prefix: str) -> list[Problem]:
    """A problem for each person with one photo."""
    alone = np.flatnonzero(np.bincount(identity, minlength=len(people)) == 1)
    return [Problem(path=f"{prefix}{people[person]}", reason=_ONE_PHOTO) for person in alone]


def problem_lines(photos: Photos) -> list[str]:
    """What was odd about the photos, to print: a line a kind, with its count and first path; [] if nothing was.

    People with one photo are usual, and only counted.
    """
    kinds: dict[str, list[Problem]] = {}
    for problem in photos.problems:
        kinds.setdefault(problem.reason.partition(":")[0], []).append(problem)
    alone = kinds.pop(_ONE_PHOTO.partition(":")[0], [])
    lines = []
    for kind, found in kinds.items():
        outcome = found[0].reason.partition(":")[2].strip()
        lines.append(f"{len(found):,} × {kind}, first {found[0].path}" + (f": {outcome}" if outcome else ""))
    if alone:
        lines.append(f"{len(alone):,} × {_ONE_PHOTO}")
    if kinds:
        lines.append(f"python launch.py data info {photos.source} --json FILE lists all")
    return lines


# ---- prepared sets ---------------------------------------------------------------------------------------------------


RESERVED = ("celeba", "lfw", "downloads", "folders", "records")
"""What lies in a data directory under names of its own."""


def check_name(name: str) -> str:
    """The name of a set of InsightFace's, for "prepared:NAME".

    Raises:
      ValueError: it cannot be one.
    """
    if name in RESERVED or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        raise ValueError(
            f"{name!r} cannot be a prepared set's name: letters, digits and . _ - make one, and "
            f"{', '.join(RESERVED)} are taken. Try ms1mv3."
        )
    return name


def _prepared(source: str, data_dir: Path) -> Photos:
    """A set that `launch.py data prepare` wrote."""
    kind, _, name = source.partition(":")
    folder = data_dir / (check_name(name) if kind == "prepared" else source)
    try:
        with np.load(folder / "index.npz") as index:
            keys, identity, people, record = (index[name] for name in ("keys", "identity", "people", "record"))
        about = json.loads((folder / "index.json").read_text())
    except FileNotFoundError as error:
        example = {
            "lfw": "python launch.py data prepare lfw",
            "celeba": "python launch.py data prepare celeba --archive img_align_celeba.zip "
            "--identities identity_CelebA.txt",
            "prepared": f"python launch.py data prepare insightface --archive PATH/train.rec --save-as {name}",
        }[kind]
        raise FileNotFoundError(
            f"{source} is not prepared in {data_dir} ({error.filename} is missing). Prepare it once:\n  {example}"
        ) from error
    examples = _Records(folder / about["version"])

    def read(index: int) -> np.ndarray:
        try:
            return decode(examples[int(record[index])])
        # array_record raises RuntimeError where a checksum does not fit.
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{source}: photo {keys[index]} does not decode ({error}): the prepared set is damaged. "
                f"Run python launch.py data prepare {about.get('again', source)} --overwrite again."
            ) from error

    return Photos(
        source=source,
        keys=keys,
        identity=identity,
        people=people,
        read=read,
        square=Square(**about["square"]) if about["square"] else None,
        problems=tuple(Problem(**problem) for problem in json.loads((folder / "problems.json").read_text())),
        fingerprint=fingerprint_of(keys, people, about["content"]),
        named=about.get("named", True),
        template=about.get("template"),
    )


class _Records:
    """The encoded images of a prepared set by record number; opened by the first read."""

    def __init__(self, folder: Path):
        # Here and not in the first read: that comes from a pool of threads, and while tensorflow-datasets is imported
        # the import statements of all other threads fail (etils replaces `__import__` for the whole process).
        import tensorflow_datasets as tfds

        self._tfds: Any = tfds
        self._folder, self._lock = folder, threading.Lock()
        self._source: Any = None

    def __getitem__(self, record: int) -> bytes:
        with self._lock:
            if self._source is None:
                builder = self._tfds.builder_from_directory(self._folder)
                skip = self._tfds.decode.SkipDecoding()
                self._source = builder.as_data_source(split="photos", decoders={"image": skip})
        return self._source[record]["image"]


def _celeba_lfw(source: str, data_dir: Path) -> Photos:
    """CelebA and the people of LFW View 1's training half."""
    from faceembed.data import pairs  # which opens sources itself

    celeba = open_source("celeba", data_dir=data_dir)
    lfw = pairs.load_people("all:lfw:dev_train", data_dir=data_dir, split="train", allow_missing=False)
    return joined(source, [celeba, lfw])


def joined(source: str, parts: Sequence[Photos]) -> Photos:
    """The photos of several sources as one. People of equal names are taken for one person.

    Args:
      source: what the whole is called.
      parts: each with photos of one size, another one than the others', and a square.

    Raises:
      ValueError: two parts have photos of one width, which decides about the square, or share a key.
    """
    squares: dict[int, Square] = {}
    for part in parts:
        width = part.read(0).shape[1]
        square = part.square_in(width)
        if square is None or width in squares:
            raise ValueError(
                f"{part.source}: photos {width} px wide need a square of their own to be joined with others."
            )
        squares[width] = square
    keys = np.concatenate([part.keys for part in parts])
    if len(np.unique(keys)) < len(keys):
        raise ValueError(f"{source}: two of its parts have photos of one key.")
    owners = np.concatenate([part.people[part.identity] for part in parts])
    starts = np.cumsum([0, *(len(part) for part in parts)])
    order, sorted_keys, identity, people = arrange(keys.tolist(), owners.tolist())

    def read(index: int) -> np.ndarray:
        place = order[index]
        part = int(np.searchsorted(starts, place, side="right")) - 1
        return parts[part].read(int(place - starts[part]))

    def square_of(width: int) -> Square:
        if width not in squares:
            raise ValueError(
                f"{source} has a photo {width} px wide, and only {', '.join(map(str, squares))} are known."
            )
        return squares[width]

    return Photos(
        source=source,
        keys=sorted_keys,
        identity=identity,
        people=people,
        read=read,
        square=square_of,
        problems=tuple(problem for part in parts for problem in part.problems),
        fingerprint=fingerprint_of(sorted_keys, people, " ".join(part.fingerprint for part in parts)),
    )


# ---- a folder a person -----------------------------------------------------------------------------------------------


def _folder(source: str, data_dir: Path, *, progress: bool = True) -> Photos:
    """PATH/PERSON/PHOTO.jpg; every file is decoded once, and what was found is remembered by size and time."""
    root = Path(source.partition(":")[2]).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root.absolute()}. Give one that holds a folder a person.")
    files: list[tuple[Path, str]] = []
    problems: list[Problem] = []
    for person in sorted(root.iterdir()):
        if person.name.startswith(".") or person.name in (CARD, JOURNAL):
            continue
        if not person.is_dir():
            problems.append(Problem(path=str(person), reason="file beside the people's folders: left out"))
            continue
        entries = [entry for entry in sorted(person.rglob("*")) if not entry.name.startswith(".")]
        found = [entry for entry in entries if entry.is_file()]
        for link in (entry for entry in entries if entry.is_symlink() and not entry.is_file()):
            # `rglob` does not go into linked folders: they could lead in a circle.
            reason = "link to a folder: left out" if link.is_dir() else f"broken link: left out, no {link.readlink()}"
            problems.append(Problem(path=str(link), reason=reason))
        unreadable = [file for file in found if not _is_text(file)]
        for file in unreadable:
            shown = str(file).encode(errors="backslashreplace").decode()
            problems.append(Problem(path=shown, reason="its name is no UTF-8 text: left out, rename it"))
        found = [file for file in found if file not in unreadable]
        images = [file for file in found if file.suffix.lower() in IMAGE_SUFFIXES]
        others = sorted(set(found) - set(images))
        problems += [Problem(path=str(file), reason="not an image by its name: left out") for file in others]
        if not images:
            problems.append(Problem(path=str(person), reason="empty folder: no photo of this person"))
        files += [(file, person.name) for file in images]

    cache = data_dir / "folders" / f"{_digest(str(root.resolve()))[:16]}.json"
    checked = _check_files([file for file, _ in files], cache, progress)
    keys: list[str] = []
    owners: list[str] = []
    paths: list[Path] = []
    hashes: list[str] = []
    by_key: dict[str, Path] = {}
    by_content: dict[str, dict[str, Path]] = {}
    for (file, person_name), (content, failure) in zip(files, checked, strict=True):
        key = file.relative_to(root).with_suffix("").as_posix()
        if failure:
            problems.append(Problem(path=str(file), reason=f"corrupt image: left out ({failure})"))
            continue
        if key in by_key:
            problems.append(Problem(path=str(file), reason=f"duplicate name: left out, {by_key[key].name} is kept"))
            continue
        copies = by_content.setdefault(content, {})
        if person_name in copies:
            reason = f"duplicate content: left out, the same file as {copies[person_name].relative_to(root)}"
            problems.append(Problem(path=str(file), reason=reason))
            continue
        if copies:
            other = next(iter(copies.values())).relative_to(root)
            reason = f"two people's photo: kept as both, the same file as {other}"
            problems.append(Problem(path=str(file), reason=reason))
        by_key[key] = copies[person_name] = file
        keys.append(key)
        owners.append(person_name)
        paths.append(file)
        hashes.append(content)
    if not keys:
        raise ValueError(
            f"{source}: no photo found in {root.absolute()} ({len(problems)} problems"
            + (f", first: {problems[0].path}: {problems[0].reason}" if problems else "")
            + "). Expected one folder a person: PERSON/PHOTO.jpg."
        )
    order, sorted_keys, identity, people = arrange(keys, owners)
    ordered = [paths[index] for index in order]
    content = _digest("".join(hashes[index] for index in order))

    def read(index: int) -> np.ndarray:
        try:
            return decode(ordered[index].read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"photo {ordered[index]} no longer reads ({error}), though it did when the folder was opened. "
                "Restore or remove it, and start again."
            ) from error

    return Photos(
        source=source,
        keys=sorted_keys,
        identity=identity,
        people=people,
        read=read,
        square=None,
        problems=tuple(problems + lonely(identity, people, f"{root}/")),
        fingerprint=fingerprint_of(sorted_keys, people, content),
        template=_card_template(root),
    )


def _card_template(root: Path) -> str | None:
    """The template that `launch.py align` cut a folder's photos to; None for other folders."""
    try:
        card = json.loads((root / CARD).read_text())
        template, whole = str(card["template"]), "photos" in card
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{root / CARD} does not read ({error}): it says how the photos were aligned. Align them again, or remove it "
            "if these photos were never aligned."
        ) from error
    if not whole:
        raise ValueError(
            f"{root} is not whole: its alignment was stopped. Give the same python launch.py align command again; it goes "
            "on where it was."
        )
    return template


def _is_text(path: Path) -> bool:
    """Whether a path can be printed, hashed and stored: bytes that are no UTF-8 become lone surrogates in Python."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_files(files: list[Path], cache: Path, progress: bool) -> list[tuple[str, str | None]]:
    """(SHA-256 of the content, why it does not decode or None) of each file; unchanged files are not read again."""
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):
        known = {}

    def check(file: Path) -> tuple[str, list]:
        stat = file.stat()
        was = known.get(str(file))
        if was and was[:2] == [stat.st_size, stat.st_mtime_ns]:
            return str(file), was
        content, failure = "", None
        try:
            data = file.read_bytes()
            content = hashlib.sha256(data).hexdigest()
            decode(data)
        except (OSError, ValueError) as error:
            failure = str(error).replace(str(file), file.name)
        return str(file), [stat.st_size, stat.st_mtime_ns, content, failure]

    with concurrent.futures.ThreadPoolExecutor() as pool:
        now = dict(progress_bar(pool.map(check, files), len(files), "checking photos", shown=progress))
    if now != known:
        with contextlib.suppress(OSError):  # the cache saves time, nothing else
            report.write_text(cache, json.dumps(now))
    return [(now[str(file)][2], now[str(file)][3]) for file in files]


# ---- InsightFace's .rec ----------------------------------------------------------------------------------------------


def _insightface(source: str, data_dir: Path, *, progress: bool = True) -> Photos:
    from faceembed.data import recordio  # which makes `Photos` itself

    return recordio.open_photos(source, data_dir, progress=progress)


# ---- rendered --------------------------------------------------------------------------------------------------------


def _synthetic(
    source: str, data_dir: Path, *, people: int = 400, photos: int = 12, seed: int = 0, size: int = 64
) -> Photos:
    """`faceembed.data.synthetic`, all rendered by the first read."""
    if people < 1 or photos < 1 or size < 16:
        raise ValueError(f"synthetic: people={people}, photos={photos}, size={size}: expected ≥ 1, ≥ 1 and ≥ 16 px.")
    # The seed is part of a name: another seed draws other people, who must not be taken for these.
    names = np.array([f"synthetic_s{seed}_{person:06d}" for person in range(people)])
    keys = np.array([f"{name}/{photo:04d}" for name in names for photo in range(photos)])

    lock = threading.Lock()
    rendered: list[np.ndarray] = []

    def read(index: int) -> np.ndarray:
        with lock:
            if not rendered:
                from faceembed.data import synthetic

                rendered.append(synthetic.render_all(seed, people, photos, size))
        return rendered[0][index]

    return Photos(
        source=source,
        keys=keys,
        identity=np.repeat(np.arange(people, dtype=np.int32), photos),
        people=names,
        read=read,
        square=None,
        problems=(),
        # 3: the renderer; a run goes on only with the faces that it began with.
        fingerprint=fingerprint_of(keys, names, f"synthetic 3 {seed} {size}"),
    )


SOURCES: dict[str, Callable[..., Photos]] = {
    "celeba": _prepared,
    "lfw": _prepared,
    "celeba_lfw": _celeba_lfw,
    "synthetic": _synthetic,
    "folder:PATH": _folder,
    "insightface:PATH": _insightface,
    "prepared:NAME": _prepared,
}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def progress_bar(items: Any, total: int | None, what: str, *, shown: bool = True) -> Any:
    """The items, with a progress bar on stderr where there are enough to wait for."""
    live = sys.stderr.isatty()
    quiet = not shown or (total is not None and total < 1000)
    # A log file gets a line each half minute, and none for short work.
    interval, delay = (0.1, 0) if live else (30, 10)
    return tqdm(items, total=total, desc=what, unit=" photos", disable=quiet, mininterval=interval, delay=delay)

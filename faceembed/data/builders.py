"""Photographs from archives into array_record, once, by TFDS builders that need no TensorFlow.

    DATA_DIR/celeba/1.0.0/celeba-photos.array_record-00000-of-00001 …   what TFDS reads
    DATA_DIR/celeba/index.npz       keys, identity, people, and the record of each photo
    DATA_DIR/celeba/index.json      version, square, and the hash of the contents
    DATA_DIR/celeba/problems.json   everything that was left out, or kept though odd

A set of InsightFace's goes into DATA_DIR/NAME likewise, but in order and as a stream: it may have millions of photos.
A set is built beside its place and moved there when it is complete.
"""

import collections
import concurrent.futures
import contextlib
import fcntl
import hashlib
import io
import json
import secrets
import shlex
import shutil
import socket
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from faceembed.data import pairs, recordio, sources
from faceembed.data.sources import Problem

VERSION = "1.0.0"

# The square that matches CelebA's and LFW's framing of a face: chin to forehead, a little hair.
CELEBA_FRAMES = {
    (89, 109): {"x": 44.5, "y": 62.0, "side": 64.0},
    (178, 218): {"x": 89.0, "y": 124.0, "side": 128.0},
}
"""(width, height) of CelebA's aligned photos, at half size and full → the square in them, pixels."""
LFW_SQUARE = {"x": 125.0, "y": 127.0, "side": 141.0}
"""The square in LFW's deep-funneled photos of 250 × 250 px."""

LFW_URL = "http://vis-www.cs.umass.edu/lfw/"
LFW_ARCHIVE = "lfw-deepfunneled.tgz"
LFW_LISTS = ("pairsDevTrain.txt", "pairsDevTest.txt", "peopleDevTrain.txt", "peopleDevTest.txt")
"""View 1, fetched with the archive. View 2 (pairs.txt) is for the final figure, and copied only where it is given."""
LFW_OPTIONAL = ("pairs.txt", "people.txt")


_AGAIN = "It was fetched and is deleted now; the same command fetches it again."


class DamagedArchive(ValueError):
    """A file that is no archive, or not a whole one."""

    def __init__(self, message: str, path: Path):
        super().__init__(message)
        self.path = path


def prepare(
    name: str,
    *,
    archives: Sequence[Path | str] = (),
    identities: Path | str | None = None,
    pairs_dir: Path | str | None = None,
    data_dir: Path | str | None = None,
    align: bool = False,
    save_as: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Builds a set.

    Args:
      name: "celeba", "lfw" or "insightface".
      archives: tar, tar.gz, zip, or folders they were unpacked into. "lfw" downloads its own when none is given;
        "insightface" is a .rec, or the folder of train.rec.
      identities: "celeba" alone: identity_CelebA.txt, an image name and a number a line.
      pairs_dir: "lfw" alone: where the pairs and people lists are, if not beside the archive.
      data_dir: where prepared sets are kept; None is `sources.default_data_dir()`.
      align: bring photos that are not in CelebA's frame into it, with a face detector; those without a face are left
        out and reported.
      save_as: "insightface" alone: NAME in the source prepared:NAME; None is the name of the folder that holds the .rec.
      overwrite: replace a set that is there.
      progress: show a bar.

    Returns:
      {"name" (the source), "folder", "people", "photos", "problems": list of {"path", "reason"}, "bytes", "seconds"}.

    Raises:
      ValueError, FileNotFoundError, FileExistsError: saying what to type instead. Nothing is left behind.
    """
    began = time.monotonic()
    if name not in BUILDERS:
        raise ValueError(f"there is nothing to prepare for {name!r}: choose from {', '.join(BUILDERS)}.")
    data_dir = (sources.default_data_dir() if data_dir is None else Path(data_dir)).expanduser()
    if name == "insightface":
        if identities is not None or pairs_dir is not None or align:
            raise ValueError(
                "insightface is a .rec, which says who is who and is aligned already: leave out --identities, --pairs-dir "
                "and --align."
            )
        return _prepare_insightface(archives, save_as, data_dir, overwrite=overwrite, progress=progress, began=began)
    if save_as is not None:
        raise ValueError(f"{name} is prepared under its own name: leave out --save-as.")
    target, downloads = data_dir / name, data_dir / "downloads"
    if target.exists() and not overwrite:
        raise FileExistsError(f"{name} is prepared already in {target}. To build it anew, add --overwrite.")
    paths = [Path(archive).expanduser() for archive in archives]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"archive {path} does not exist. Check --archive.")

    lists: list[Path] = []
    promised: dict[str, int] = {}
    problems: list[Problem] = []
    if name == "lfw":
        if identities is not None or align:
            raise ValueError("lfw names people by folder and is aligned already: leave out --identities and --align.")
        paths = paths or [download(LFW_URL + LFW_ARCHIVE, downloads, "--archive", progress=progress)]
        if len(paths) != 1:
            raise ValueError(f"lfw is one archive, got {len(paths)}: give one --archive.")
        lists = _lfw_lists(paths[0], pairs_dir, data_dir, downloaded=not archives, progress=progress)
        for path in lists:
            try:
                if path.name.startswith("people"):
                    people, count, _ = pairs.read_lfw_people(path)
                    promised |= dict(zip(people.tolist(), count.tolist(), strict=True))
                else:
                    pairs.read_lfw_pairs(path)
            except ValueError as error:
                if path.parent != downloads or path.name not in LFW_LISTS or archives or pairs_dir:
                    raise
                path.unlink()
                raise ValueError(f"{error} {_AGAIN}") from error
        photos = _lfw_photos(paths[0], problems, progress)
        square = LFW_SQUARE
    else:
        if not paths:
            raise ValueError(
                "celeba needs its archive, which its terms do not let a program fetch: get img_align_celeba.zip and "
                "identity_CelebA.txt from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, then add "
                "--archive img_align_celeba.zip --identities identity_CelebA.txt."
            )
        if identities is None:
            raise ValueError("celeba needs the people's numbers: add --identities identity_CelebA.txt.")
        if pairs_dir is not None:
            raise ValueError("celeba has no pairs lists: leave out --pairs-dir; --pairs heldout:celeba needs none.")
        identities = Path(identities).expanduser()
        if not identities.is_file():
            raise FileNotFoundError(f"there is no file {identities}. Check --identities.")
        number_of = read_identities(identities)
        aligned, loose, frame = _sort_archives(paths, align)
        photos = _celeba_photos(aligned, loose, frame, number_of, problems, progress)
        square = CELEBA_FRAMES[frame]

    data_dir.mkdir(parents=True, exist_ok=True)
    try:
        with _workshop(data_dir, name) as workshop:
            gathered = _Gathered(photos)
            builder = BUILDERS[name](photos=gathered, data_dir=workshop, version=VERSION)
            # One bar, ours, on stderr; TFDS would add four and a banner.
            tfds.disable_progress_bar()
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(
                    file_format="array_record",
                    download_config=tfds.download.DownloadConfig(compute_stats="skip", try_download_gcs=False),
                )
            built = workshop / name
            present = collections.Counter(gathered.owners)
            problems += [
                Problem(path=f"{name}/{person}", reason=f"incomplete: {present[person]} of {count} photos listed")
                for person, count in promised.items()
                if present[person] != count
            ]
            _write_index(built, gathered, problems, square, name)
            for path in lists:
                shutil.copyfile(path, built / path.name)
            _swap(built, target, workshop / "replaced")
    except DamagedArchive as error:
        if archives:
            raise
        error.path.unlink()
        raise DamagedArchive(f"{error} {_AGAIN}", error.path) from error
    return _built(name, target, len(set(gathered.owners)), len(gathered.keys), problems, began)


def _built(
    source: str, target: Path, people: int, photos: int, problems: Sequence[Problem], began: float
) -> dict[str, Any]:
    return {
        "name": source,
        "folder": str(target),
        "people": people,
        "photos": photos,
        "problems": [{"path": problem.path, "reason": problem.reason} for problem in problems],
        "bytes": sum(file.stat().st_size for file in target.rglob("*") if file.is_file()),
        "seconds": time.monotonic() - began,
    }


def _swap(built: Path, target: Path, aside: Path) -> None:
    """Puts a finished set in its place; the one that was there comes back if that fails."""
    if not target.exists():
        built.rename(target)
        return
    target.rename(aside)
    try:
        built.rename(target)
    except OSError:
        aside.rename(target)
        raise


@contextlib.contextmanager
def _workshop(data_dir: Path, name: str) -> Iterator[Path]:
    """A folder to build a set in, removed at the end; those that killed preparations left are removed first.

    Whoever builds holds a lock in it, which goes with the process, however that ends. Hosts share a data directory, and in
    containers all processes have the same number: neither tells who is still at work.
    """
    for left in data_dir.glob(f".{name}.*.part"):
        # OSError: it is held, or the file system has no locks; then nobody can tell.
        with contextlib.suppress(OSError), open(left / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
    workshop = data_dir / f".{name}.{socket.gethostname()}.{secrets.token_hex(4)}.part"
    unlocked = workshop.with_suffix(".new")  # by a name that nobody looks for until the lock is held
    unlocked.mkdir()
    try:
        with open(unlocked / "lock", "a") as lock:
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unlocked.rename(workshop)
            yield workshop
    finally:
        for folder in (workshop, unlocked):
            shutil.rmtree(folder, ignore_errors=True)


def read_identities(path: Path) -> dict[str, str]:
    """identity_CelebA.txt: image name without its ending → the person's number as text.

    Raises:
      FileNotFoundError, ValueError: naming the line that is not "000001.jpg 2880".
    """
    number_of = {}
    for line_number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or not words[1].isdigit():
            raise ValueError(
                f"{path}, line {line_number}: {line!r} is not an image name and a number, like 000001.jpg 2880."
            )
        number_of[PurePosixPath(words[0]).stem] = str(int(words[1]))
    if not number_of:
        raise ValueError(f"{path} is empty: expected lines like 000001.jpg 2880.")
    return number_of


def download(url: str, folder: Path, flag: str, *, progress: bool = True) -> Path:
    """Fetches a file unless it is in the folder already, and prints its size and SHA-256.

    Raises:
      ConnectionError: saying how to go on offline: `flag` FILE.
    """
    name = url.rsplit("/", 1)[1]
    target = folder / name
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{name}.{secrets.token_hex(4)}.part"
    digest, size = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(url, timeout=30) as response, part.open("wb") as file:
            expected = int(response.headers.get("Content-Length") or 0)
            chunks = iter(lambda: response.read(1 << 20), b"")
            for chunk in sources.progress_bar(chunks, expected >> 20, name, shown=progress):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
        if expected and size != expected:
            raise ConnectionError(f"the connection ended after {size} of {expected} bytes")
        part.replace(target)
    except (OSError, urllib.error.URLError) as error:
        raise ConnectionError(
            f"{url} could not be fetched ({error}). Get {name} another way and add {flag} "
            f"{name if flag == '--archive' else 'FOLDER'}, or try again."
        ) from error
    finally:
        part.unlink(missing_ok=True)
    print(f"{target}: {size:,} bytes, sha256 {digest.hexdigest()}", file=sys.stderr)
    return target


# ---- TFDS ------------------------------------------------------------------------------------------------------------


class _Gathered:
    """Photos on their way into a set; keeps what the index needs once they have passed."""

    def __init__(self, photos: Iterable[tuple[str, str, bytes]]):
        self._photos = photos
        self.keys: list[str] = []
        self.owners: list[str] = []
        self.hashes: list[str] = []

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for key, person, data in self._photos:
            self.keys.append(key)
            self.owners.append(person)
            self.hashes.append(hashlib.sha256(data).hexdigest())
            yield key, {"image": data, "key": key, "person": person}
        if not self.keys:
            raise ValueError("the archives hold no photo that can be used. Check --archive.")


def _dataset_info(builder: tfds.core.DatasetBuilder, description: str, homepage: str) -> tfds.core.DatasetInfo:
    # Encoded bytes pass through `Image` untouched; an array would need TensorFlow.
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "key": tfds.features.Text(),
        "person": tfds.features.Text(),
    }
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        features=tfds.features.FeaturesDict(features),
        homepage=homepage,
    )


# TFDS has builders of these names; ours stay out of its registry.
class CelebA(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Aligned photos of people who are numbers."""

    name = "celeba"
    VERSION = tfds.core.Version(VERSION)

    def __init__(self, *, photos: Iterable[tuple[str, dict[str, Any]]] = (), **kwargs: Any):
        self._photos = photos
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return _dataset_info(
            self, "CelebA (Liu et al. 2015), aligned.", "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"photos": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from self._photos


class LFW(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Deep-funneled photos of people who are names."""

    name = "lfw"
    VERSION = tfds.core.Version(VERSION)

    def __init__(self, *, photos: Iterable[tuple[str, dict[str, Any]]] = (), **kwargs: Any):
        self._photos = photos
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return _dataset_info(self, "Labeled Faces in the Wild (Huang et al. 2007), deep-funneled.", LFW_URL)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"photos": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from self._photos


class InsightFace(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Photos out of a .rec, of people who are labels. Written in order, not by `_generate_examples`."""

    name = "insightface"
    VERSION = tfds.core.Version(VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        return _dataset_info(
            self,
            "A training set of InsightFace's (MS1MV3, Glint360K, …), 112 px.",
            "https://github.com/deepinsight/insightface",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from ()


BUILDERS: dict[str, Callable[..., tfds.core.DatasetBuilder]] = {
    "celeba": CelebA,
    "lfw": LFW,
    "insightface": InsightFace,
}


def _write_index(
    built: Path, gathered: _Gathered, problems: list[Problem], square: dict[str, float], name: str
) -> None:
    """Adds index.npz, index.json and problems.json; TFDS shuffles records, so their keys are read back."""
    order, keys, identity, people = sources.arrange(gathered.keys, gathered.owners)
    records = tfds.builder_from_directory(built / VERSION).as_data_source(
        split="photos", decoders={"image": tfds.decode.SkipDecoding()}
    )
    record_of = {record["key"].decode(): number for number, record in enumerate(records)}
    problems += sources.lonely(identity, people, f"{name}/")
    record = np.array([record_of[key] for key in keys], np.int64)
    content = hashlib.sha256("".join(gathered.hashes[index] for index in order).encode()).hexdigest()
    index = {"keys": keys, "identity": identity, "people": people, "record": record}
    _save_index(built, index, {"square": square, "content": content}, problems)


def _save_index(built: Path, index: dict[str, np.ndarray], about: dict[str, Any], problems: Sequence[Problem]) -> None:
    np.savez(built / "index.npz", **index)  # type: ignore[arg-type]
    (built / "index.json").write_text(json.dumps({"version": VERSION} | about, indent=1) + "\n")
    told = [{"path": problem.path, "reason": problem.reason} for problem in problems]
    (built / "problems.json").write_text(json.dumps(told, indent=1) + "\n")


# ---- InsightFace -----------------------------------------------------------------------------------------------------

SHARD = 65_536
"""Photos in a file of array_record, some 500 MB."""
_TOGETHER = 2_048
"""Photos that are in memory at once."""


def _prepare_insightface(
    archives: Sequence[Path | str],
    save_as: str | None,
    data_dir: Path,
    *,
    overwrite: bool,
    progress: bool,
    began: float,
) -> dict[str, Any]:
    """A .rec, photo by photo in the order of people; the encoded bytes stay as they are."""
    if len(archives) != 1:
        raise ValueError(f"insightface is one .rec, got {len(archives)}: give --archive PATH/train.rec.")
    path = recordio.locate(archives[0])
    try:
        name = sources.check_name(path.absolute().parent.name if save_as is None else save_as)
    except ValueError as error:
        raise ValueError(f"{error} Say it with --save-as NAME.") from error
    source, target = f"prepared:{name}", data_dir / name
    if target.exists() and not overwrite:
        raise FileExistsError(f"{source} is prepared already in {target}. To build it anew, add --overwrite.")
    records = recordio.open_records(path, cache=data_dir / "records", progress=progress)
    data_dir.mkdir(parents=True, exist_ok=True)
    problems = list(records.problems)
    with _workshop(data_dir, name) as workshop:
        if shutil.disk_usage(data_dir).free < records.file.size:
            raise OSError(
                f"{data_dir} has {shutil.disk_usage(data_dir).free / 1e9:.1f} GB left, and the set needs about "
                f"{records.file.size / 1e9:.1f}. Make room, or name another place with --data-dir."
            )
        info = InsightFace(data_dir=workshop, version=VERSION, file_format="array_record").info
        Path(info.data_dir).mkdir(parents=True)
        writer = tfds.core.SequentialWriter(info, max_examples_per_shard=SHARD, file_format="array_record")
        writer.initialize_splits(["photos"])
        stream = _Stream(records, problems)
        with sources.progress_bar(None, len(records), "preparing", shown=progress) as bar:
            for examples, passed in stream:
                writer.add_examples({"photos": examples})
                bar.update(passed)
        writer.close_all()
        if not stream.kept.any():
            raise ValueError(f"{path} holds no photo that can be used ({problems[-1].reason}). Check --archive.")
        kept = np.flatnonzero(stream.kept)
        changes = np.diff(records.label[kept], prepend=-1) != 0
        identity = np.cumsum(changes, dtype=np.int32) - np.int32(1)
        people, keys = recordio.people_of(records, records.label[kept][changes]), stream.keys[kept]
        problems += [*stream.copies(), *sources.lonely(identity, people, f"{path}:")]
        index = {"keys": keys, "identity": identity, "people": people, "record": np.arange(len(kept))}
        about = {
            "square": None, "template": recordio.TEMPLATE, "named": False, "content": stream.digest.hexdigest(),
            "again": f"insightface --archive {shlex.quote(str(path))} --save-as {name}",
        }  # fmt: skip
        built = workshop / "insightface"
        _save_index(built, index, about, problems)
        _swap(built, target, workshop / "replaced")
    return _built(source, target, len(people), len(kept), problems, began)


class _Stream:
    """The usable photos of a .rec, some at a time, and what is known of all of them once they have passed."""

    def __init__(self, records: recordio.Records, problems: list[Problem]):
        self.keys = recordio.keys_of(records)
        self.kept = np.zeros(len(records), bool)
        self.digest = hashlib.sha256()
        """Of the hashes of the photos that are kept, in order."""
        self._records, self._problems = records, problems
        self._hashes = np.zeros(len(records), np.uint64)
        """The first eight bytes of each: enough to find copies among a hundred million."""

    def __iter__(self) -> Iterator[tuple[list[dict[str, Any]], int]]:
        """(examples, how many photos they were chosen from)."""
        label, seen = -1, dict[bytes, int]()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for start in range(0, len(self._records), _TOGETHER):
                chosen = range(start, min(start + _TOGETHER, len(self._records)))
                examples = []
                for index, (data, content, odd) in zip(chosen, pool.map(self._look, chosen), strict=True):
                    if self._records.label[index] != label:  # a person's photos follow one another
                        label, seen = int(self._records.label[index]), {}
                    if not odd and content in seen:
                        odd = f"duplicate content: left out, the same as {self.keys[seen[content]]}"
                    if odd:
                        self._problems.append(Problem(path=self._where(index), reason=odd))
                        continue
                    seen[content] = index
                    self.kept[index] = True
                    self.digest.update(content)
                    self._hashes[index] = int.from_bytes(content[:8], "little")
                    key = str(self.keys[index])
                    examples.append({"image": data, "key": key, "person": key.partition("/")[0]})
                yield examples, len(chosen)

    def _look(self, index: int) -> tuple[bytes, bytes, str | None]:
        """(encoded photo, its SHA-256, why it is left out or None)."""
        try:
            own, data = self._records.photo(index)
            photo = sources.decode(data, most=sources.MOST_IN_RECORD)
        except ValueError as error:
            return b"", b"", f"corrupt image: left out ({error})"
        if own != self._records.label[index]:
            return b"", b"", f"labels disagree: left out, {own:g} and in the range of {self._records.label[index]}"
        if photo.shape[0] != photo.shape[1]:
            size = f"{photo.shape[1]}×{photo.shape[0]}"
            return b"", b"", f"odd size: left out, {size} where crops of the template are square"
        return data, hashlib.sha256(data).digest(), None

    def _where(self, index: int) -> str:
        return f"{self._records.file.path}:{self.keys[index]}"

    def copies(self) -> list[Problem]:
        """The photos that are under two labels. They stay: nobody can tell which one is right."""
        kept = np.flatnonzero(self.kept)
        order = kept[np.argsort(self._hashes[kept], kind="stable")]
        same = np.flatnonzero(np.diff(self._hashes[order]) == 0)
        return [
            Problem(
                path=self._where(int(order[place + 1])),
                reason=f"two people's photo: kept as both, the same as {self.keys[order[place]]}",
            )
            for place in same
        ]


# ---- archives --------------------------------------------------------------------------------------------------------


def _members(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """(name, content) of each file, (name, None) of each folder, in an archive or an unpacked one.

    Raises:
      DamagedArchive: if it is no archive, or one that ends early.
    """
    count = 0
    try:
        if path.is_dir():
            for entry in sorted(path.rglob("*")):
                yield entry.relative_to(path).as_posix(), None if entry.is_dir() else entry.read_bytes()
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    yield info.filename.rstrip("/"), None if info.is_dir() else archive.read(info)
                    count += 1
        else:
            with tarfile.open(path, "r|*") as archive:
                for member in archive:
                    if member.isdir():
                        yield member.name, None
                    elif member.isfile():
                        file = archive.extractfile(member)
                        assert file is not None
                        yield member.name, file.read()
                    count += 1
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        what = "ends early or is damaged" if count else "is no tar, tar.gz or zip archive"
        message = f"{path} {what} after {count} members ({error}). Get it again, and check its size."
        raise DamagedArchive(message, path) from error


def _images(path: Path, problems: list[Problem]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each image by its name; the rest, and folders without any, are reported."""
    folders: dict[str, bool] = {}
    for name, data in _members(path):
        pure = PurePosixPath(name)
        if any(part.startswith(".") or part == "__MACOSX" for part in pure.parts if part != "."):
            continue
        if data is None:
            folders.setdefault(str(pure), False)
            continue
        if pure.suffix.lower() not in sources.IMAGE_SUFFIXES:
            problems.append(Problem(path=f"{path}:{name}", reason="not an image by its name: left out"))
            continue
        for parent in pure.parents:
            folders[str(parent)] = True
        yield name, data
    for folder, used in folders.items():
        if not used:
            problems.append(Problem(path=f"{path}:{folder}", reason="empty folder: no photo of this person"))


def _counted(paths: Sequence[Path], progress: bool) -> Any:
    """A progress bar over the images of archives, with a total where that is cheap to know."""
    total = 0
    for path in paths:
        if path.is_file() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                total += len(archive.namelist())
        elif path.is_file() and tarfile.is_tarfile(path) and path.suffix == ".tar":
            # Reading the archive itself reports one that ends early.
            with contextlib.suppress(tarfile.TarError), tarfile.open(path) as archive:
                total += len(archive.getmembers())
    return sources.progress_bar(None, total or None, "preparing", shown=progress)


# ---- CelebA ----------------------------------------------------------------------------------------------------------


def _sort_archives(paths: Sequence[Path], align: bool) -> tuple[list[Path], list[Path], tuple[int, int]]:
    """Aligned archives, others, and the frame (width, height) of the set: by the first image of each."""
    aligned, loose, frames = [], [], []
    for path in paths:
        size = None
        for _, data in _images(path, []):
            try:
                size = sources.decode(data).shape[1::-1]
            except ValueError:
                continue
            break
        if size is None:
            raise ValueError(f"{path} holds no image that decodes. Check --archive.")
        if size in CELEBA_FRAMES:
            aligned.append(path)
            frames.append(size)
        elif align:
            loose.append(path)
        else:
            expected = " or ".join(f"{width}×{height}" for width, height in CELEBA_FRAMES)
            raise ValueError(
                f"{path} holds photos of {size[0]}×{size[1]} px, so they are not CelebA's aligned ones ({expected}). "
                "To find the faces and align them, add --align; else leave the archive out."
            )
    return aligned, loose, max(frames, default=(89, 109))


def _celeba_photos(
    aligned: list[Path],
    loose: list[Path],
    frame: tuple[int, int],
    number_of: dict[str, str],
    problems: list[Problem],
    progress: bool,
) -> Iterator[tuple[str, str, bytes]]:
    """(key, person, encoded image) of every usable photo; aligned archives first, so that theirs is kept of two."""
    if loose:
        from faceembed.data import align
    named: dict[str, str] = {}
    contents: dict[str, dict[str, str]] = {}
    bar = _counted([*aligned, *loose], progress)
    for path in [*aligned, *loose]:
        for name, data in _images(path, problems):
            bar.update()
            where, pure = f"{path}:{name}", PurePosixPath(name)
            person = number_of.get(pure.stem)
            folder = pure.parent.name
            if person is None:
                problems.append(Problem(path=where, reason="no identity: left out, the identity file does not name it"))
                continue
            if folder.isdigit() and str(int(folder)) != person:
                reason = f"identities disagree: left out, the folder says {folder} and the identity file {person}"
                problems.append(Problem(path=where, reason=reason))
                continue
            if pure.stem in named:
                problems.append(Problem(path=where, reason=f"duplicate name: left out, {named[pure.stem]} is kept"))
                continue
            copies = contents.setdefault(hashlib.sha256(data).hexdigest(), {})
            if person in copies:
                reason = f"duplicate content: left out, the same as {copies[person]}"
                problems.append(Problem(path=where, reason=reason))
                continue
            try:
                photo = sources.decode(data)
            except ValueError as error:
                problems.append(Problem(path=where, reason=f"corrupt image: left out ({error})"))
                continue
            if path in loose:
                found = align.align_to_celeba(photo)
                if found is None:
                    problems.append(Problem(path=where, reason="no face found: left out, it cannot be aligned"))
                    continue
                photo, data = found, b""
            if photo.shape[1::-1] not in CELEBA_FRAMES:
                size = f"{photo.shape[1]}×{photo.shape[0]}"
                problems.append(Problem(path=where, reason=f"odd size: left out, {size} in an aligned archive"))
                continue
            if photo.shape[1::-1] != frame or not data:
                data = _jpeg(photo, frame)
            if copies:
                other = next(iter(copies.values()))
                problems.append(Problem(path=where, reason=f"two people's photo: kept as both, the same as {other}"))
            named[pure.stem] = copies[person] = where
            yield f"{person}/{pure.stem}", person, data
    bar.close()


def _jpeg(photo: np.ndarray, size: tuple[int, int]) -> bytes:
    """uint8 RGB [h, w, 3] → JPEG of (width, height)."""
    image = Image.fromarray(photo)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


# ---- LFW -------------------------------------------------------------------------------------------------------------


def _lfw_photos(path: Path, problems: list[Problem], progress: bool) -> Iterator[tuple[str, str, bytes]]:
    """(key, person, encoded image); copies are kept, because the official lists name them, and reported."""
    keys: dict[str, str] = {}
    contents: dict[str, str] = {}
    bar = _counted([path], progress)
    for name, data in _images(path, problems):
        bar.update()
        where, pure = f"{path}:{name}", PurePosixPath(name)
        person = pure.parent.name
        key = f"{person}/{pure.stem}"
        if not person:
            problems.append(Problem(path=where, reason="no person: left out, it lies in no folder"))
            continue
        if key in keys:
            problems.append(Problem(path=where, reason=f"duplicate name: left out, {keys[key]} is kept"))
            continue
        try:
            photo = sources.decode(data)
        except ValueError as error:
            problems.append(Problem(path=where, reason=f"corrupt image: left out ({error})"))
            continue
        if photo.shape != (250, 250, 3):
            size = f"{photo.shape[1]}×{photo.shape[0]}"
            problems.append(Problem(path=where, reason=f"odd size: left out, {size} where LFW has 250×250"))
            continue
        content = hashlib.sha256(data).hexdigest()
        if content in contents:
            other = contents[content]
            kind = "duplicate content" if other.split("/")[0] == person else "two people's photo"
            problems.append(Problem(path=where, reason=f"{kind}: kept, the official lists name both it and {other}"))
        keys[key] = where
        contents.setdefault(content, key)
        yield key, person, data
    bar.close()


def _lfw_lists(
    archive: Path, pairs_dir: Path | str | None, data_dir: Path, *, downloaded: bool, progress: bool
) -> list[Path]:
    """The pairs and people lists: given, or beside the archive, or fetched with it."""
    folder = archive.parent if pairs_dir is None else Path(pairs_dir).expanduser()
    if downloaded and pairs_dir is None:
        for name in LFW_LISTS:
            download(LFW_URL + name, data_dir / "downloads", "--pairs-dir", progress=progress)
    found = [folder / name for name in (*LFW_LISTS, *LFW_OPTIONAL) if (folder / name).is_file()]
    if pairs_dir is not None and not found:
        raise FileNotFoundError(f"none of {', '.join((*LFW_LISTS, *LFW_OPTIONAL))} is in {folder}. Check --pairs-dir.")
    return found

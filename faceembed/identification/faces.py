"""From photos to faces ready to be enrolled or decided on, or the reason why not."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import UnidentifiedImageError

from faceembed.data import crops, sources
from faceembed.data.align import Face
from faceembed.identification.quality import LIMITS, Limits, Quality, measure
from faceembed.identification.store import shown
from faceembed.preprocess import Preprocess, crop_square, framed_square

if TYPE_CHECKING:
    from faceembed.embed import Embedder

__all__ = [
    "Framing",
    "Listing",
    "Photo",
    "Shot",
    "Which",
    "aligner_of",
    "as_photos",
    "embed_faces",
    "look",
    "photos_in",
]

Photo = str | Path | NDArray[np.uint8]
"""A path, or uint8 RGB [h, w, 3]."""

Framing = Literal["detect", "tight", "celeba", "lfw"]
"""Where the face is: it is looked for; the largest centred square; or as in those sets' aligned photos."""

Which = Literal["only", "largest", "all"]
"""Which faces count: there must be one (others less than half as high are behind it); the largest; or each of them."""

CHUNK = 1024
"""Photos whose crops are in memory at once."""

BEHIND = 0.5
"""Of the largest face's height: lower ones are in the background, and "only" does not mind them."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Shot:
    """A face of a photo, or a photo without one.

    Attributes:
      photo: name of the file, or "".
      box: [4] left, top, right, bottom in pixels of the photo; None where no face was looked for or found.
      crop: uint8 RGB [s, s, 3] in the encoder's template; None where there is no face.
      quality: of the crop.
      trouble: why nothing should be decided by it, or None.
      vector: [d] float32 embedding, once it was made.
      digest: of the crop, once it was embedded: equal for copies of one photo.
    """

    photo: str
    box: NDArray[np.float64] | None = None
    crop: NDArray[np.uint8] | None = None
    quality: Quality | None = None
    trouble: str | None = None
    vector: NDArray[np.float32] | None = None
    digest: bytes | None = None


def as_photos(photos: Photo | Sequence[Photo]) -> list[Photo]:
    """A list; one photo, given bare, is a list of one."""
    if isinstance(photos, str | Path) or (isinstance(photos, np.ndarray) and photos.ndim < 4):
        return [photos]
    return list(photos)


def aligner_of(preprocess: Preprocess, framing: Framing = "detect") -> str:
    """How faces are found and framed, in words: part of what makes embeddings comparable."""
    found = "centerface" if framing == "detect" else f"framing {framing}"
    return f"{found}, {preprocess.template} {preprocess.size} px"


def look(
    photo: Photo,
    preprocess: Preprocess,
    *,
    framing: Framing = "detect",
    which: Which = "largest",
    limits: Limits = LIMITS,
) -> list[Shot]:
    """The faces of one photo.

    Args:
      photo: a path or an array.
      preprocess: of the encoder.
      framing: where the face is; another than "detect" takes one square, whatever it shows.
      which: which faces count.
      limits: of quality; a face below them comes with its `trouble`.

    Returns:
      One shot, or with "all" one for each face, the largest first; a photo without a face, and one with several where
      there must be one, gives one shot with `trouble` and no crop.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: it cannot be read.
      ValueError: it is no image, or a folder.
      ImportError: faces are to be found and the detector is not installed.
    """
    try:
        pixels = _pixels(photo)
    except (OSError, ValueError) as error:
        where = "the photo" if isinstance(photo, np.ndarray) else shown(photo)
        raise type(error)(f"{where}: {error}") from error
    return _faces(photo, pixels, preprocess, framing, which, limits)


def _faces(
    photo: Photo, pixels: NDArray[np.uint8], preprocess: Preprocess, framing: Framing, which: Which, limits: Limits
) -> list[Shot]:
    """`look` at pixels."""
    name = _name(photo)
    if framing != "detect":
        square = None if framing == "tight" else framed_square(framing, pixels.shape[1])
        crop = crop_square(pixels, square, preprocess.size)
        quality = measure(crop)
        return [Shot(photo=name, crop=crop, quality=quality, trouble=quality.trouble(limits))]
    aligner = crops.Aligner(template=preprocess.template, size=preprocess.size, face="largest")
    if which == "all":
        every = crops.find_all(pixels, aligner)
        return [_shot(pixels, face, name, aligner, limits) for face in every] or [_nobody(name)]
    found = crops.find(pixels, aligner)  # a tenth of the time of looking for every face
    if found.face is None:
        return [_nobody(name)]
    height = [float(face.box[3] - face.box[1]) for face in found.seen]
    rivals = sum(other >= BEHIND * max(height) for other in height)
    if which == "only" and rivals > 1:
        return [Shot(photo=name, trouble=f"{rivals} faces were found, and nothing tells whose photo it is")]
    return [_shot(pixels, found.face, name, aligner, limits)]


def _nobody(name: str) -> Shot:
    return Shot(photo=name, trouble="no face was found")


def _name(photo: Photo) -> str:
    return "" if isinstance(photo, np.ndarray) else Path(photo).name


def _pixels(photo: Photo) -> NDArray[np.uint8]:
    """uint8 RGB [h, w, 3]; errors do not name the photo, since whoever shows them does."""
    if isinstance(photo, np.ndarray):
        if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or not photo.size:
            raise ValueError(f"it is {photo.dtype} {list(photo.shape)}, not uint8 RGB [h, w, 3].")
        return photo
    try:
        data = Path(photo).read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError("there is no such file") from error
    except IsADirectoryError as error:
        raise ValueError("it is a folder: give a photo") from error
    except OSError as error:
        kind = PermissionError if isinstance(error, PermissionError) else OSError
        raise kind(f"it cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # no path can hold such characters
        raise ValueError(f"it cannot be a file's name: {shown(error)}") from error
    try:
        return sources.decode(data)
    except ValueError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):  # its words are a Python object's address
            raise ValueError("it is no image that Pillow reads") from error
        raise ValueError(f"it is no whole image: {error}") from error


def _shot(pixels: NDArray[np.uint8], face: Face, name: str, aligner: crops.Aligner, limits: Limits) -> Shot:
    crop = crops.draw(pixels, crops.place(face, aligner), aligner.size)
    quality = measure(crop, face=face)
    return Shot(photo=name, box=face.box, crop=crop, quality=quality, trouble=quality.trouble(limits))


def embed_faces(
    embedder: Embedder, photos: Sequence[Photo], *, framing: Framing = "detect", which: Which = "largest",
    limits: Limits = LIMITS, strict: bool = False, progress: bool = False,
) -> list[list[Shot]]:  # fmt: skip
    """`look` at many photos, on all cores, and the embeddings of the faces that will do, in batches of the device.

    A file that does not read gives a shot with that trouble, or with `strict` raises as `look`. Crops are let go: memory
    does not grow with the photos.

    Returns:
      A list for each photo, of shots with a `vector` unless there is `trouble`.
    """

    def one(photo: Photo) -> list[Shot]:
        if strict:
            return look(photo, embedder.preprocess, framing=framing, which=which, limits=limits)
        try:
            return _faces(photo, _pixels(photo), embedder.preprocess, framing, which, limits)
        except (OSError, ValueError) as error:
            return [Shot(photo=_name(photo), trouble=str(error))]

    if framing == "detect" and len(photos):
        crops.require("centerface")  # told once, and not for each photo
    found: list[list[Shot]] = []
    with (
        concurrent.futures.ThreadPoolExecutor() as pool,
        sources.progress_bar(None, len(photos), "faces", shown=progress) as bar,
    ):
        for start in range(0, len(photos), CHUNK):
            part = list(pool.map(one, photos[start : start + CHUNK]))
            ready = [shot for shots in part for shot in shots if not shot.trouble and shot.crop is not None]
            vectors = iter(embedder(np.stack([shot.crop for shot in ready if shot.crop is not None])) if ready else ())
            found += [
                [
                    dataclasses.replace(
                        shot, crop=None, vector=np.array(next(vectors), np.float32),
                        digest=hashlib.sha256(shot.crop.tobytes()).digest(),
                    )
                    if not shot.trouble and shot.crop is not None
                    else dataclasses.replace(shot, crop=None)
                    for shot in shots
                ]
                for shots in part
            ]  # fmt: skip
            bar.update(len(part))
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """What a folder holds, and what of it is left out.

    Attributes:
      photos: sorted paths.
      others: suffix → files that are no photos by their names; hidden ones do not count.
      unreadable: (path, why) of folders and files that cannot be looked into.
    """

    photos: tuple[Path, ...]
    others: Counter[str] = dataclasses.field(default_factory=Counter)
    unreadable: tuple[tuple[Path, str], ...] = ()


def photos_in(folder: Path) -> Listing:
    """Photos of a folder and of those in it; hidden files are left out, and what else is left out is told."""
    found: list[Path] = []
    others: Counter[str] = Counter()
    unreadable: list[tuple[Path, str]] = []

    def failed(error: OSError) -> None:
        unreadable.append((Path(error.filename), error.strerror or str(error)))

    for base, folders, files in os.walk(folder, onerror=failed):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [Path(base, name) for name in folders if Path(base, name).is_symlink()]
        unreadable += [(path, "it is a link to a folder, and those are not followed") for path in links]
        for name in files:
            path = Path(base, name)
            if name.startswith("."):
                continue
            if path.suffix.lower() not in sources.IMAGE_SUFFIXES:
                others[path.suffix.lower()] += 1
            elif path.is_file():
                found.append(path)
            else:
                unreadable.append((path, "it is no file, or a link to nothing"))
    return Listing(photos=tuple(sorted(found)), others=others, unreadable=tuple(sorted(unreadable)))

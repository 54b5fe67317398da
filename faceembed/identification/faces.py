"""From photos to faces ready to be enrolled or decided on, or the reason why not."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from faceembed.data import crops, sources
from faceembed.data.align import Face
from faceembed.identification.quality import LIMITS, Limits, Quality, measure
from faceembed.preprocess import Preprocess, crop_square, framed_square

if TYPE_CHECKING:
    from faceembed.embed import Embedder

__all__ = ["Framing", "Photo", "Shot", "Which", "aligner_of", "embed_faces", "look", "photos_in"]

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
    """

    photo: str
    box: NDArray[np.float64] | None = None
    crop: NDArray[np.uint8] | None = None
    quality: Quality | None = None
    trouble: str | None = None
    vector: NDArray[np.float32] | None = None


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
      ValueError: it is no image.
      ImportError: faces are to be found and the detector is not installed.
    """
    name = "" if isinstance(photo, np.ndarray) else Path(photo).name
    pixels = photo if isinstance(photo, np.ndarray) else _read(photo)
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


def _read(photo: str | Path) -> NDArray[np.uint8]:
    try:
        return sources.decode(Path(photo).read_bytes())
    except ValueError as error:
        raise ValueError(f"{photo} is no whole image: {error}") from error


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
        try:
            return look(photo, embedder.preprocess, framing=framing, which=which, limits=limits)
        except (OSError, ValueError) as error:
            if strict:
                raise
            return [Shot(photo="" if isinstance(photo, np.ndarray) else Path(photo).name, trouble=str(error))]

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
                        shot, crop=None, vector=None if shot.trouble else np.array(next(vectors), np.float32)
                    )
                    for shot in shots
                ]
                for shots in part
            ]
            bar.update(len(part))
    return found


def photos_in(folder: Path) -> Iterator[Path]:
    """Photos of a folder and of those in it, sorted; hidden files and other kinds are left out."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in sources.IMAGE_SUFFIXES and path.is_file() and not hidden:
            yield path

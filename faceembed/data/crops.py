"""From photos of any kind to crops in an encoder's template: find the face, choose it, bring it into place.

    photo → detector → which face → landmarks onto the template's → crop

A template says where the landmarks of a face lie in the square that an encoder sees; each detector has habits of its own,
so the places are known for each detector and template. `Preprocess.template` names the one that an encoder was trained on.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import io
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
from PIL import Image

from faceembed import report
from faceembed.data import align, sources
from faceembed.data.align import Face
from faceembed.data.sources import CARD, JOURNAL
from faceembed.preprocess import Preprocess, Square, Template, crop_side

_SQUARE = np.array([44.5 - 32, 62.0 - 32])  # of the portrait template in a photo of CelebA at half size
_CHIP = np.array([
    [0.8595674595992, 0.2134981538014], [0.6460604764104, 0.2289674387677], [0.1205750620789, 0.2137274526848],
    [0.3340850613712, 0.2290642403242], [0.4901123135679, 0.6277975316475],
])  # fmt: skip

LANDMARKS: dict[str, dict[str, np.ndarray]] = {
    "centerface": {
        "portrait": (align.CELEBA_HALF - _SQUARE) / 64,
        # InsightFace's own five places (its `arcface_dst`).
        "arcface": np.array(
            [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
        ) / 112,
        # Where CenterFace's landmarks lie in chips that dlib cut by its own: medians over 1,190 LFW photos (their two
        # halves agree within 0.35 of 150 px).
        "dlib": np.array([[0.3142, 0.3059], [0.6821, 0.2989], [0.4965, 0.5215], [0.3377, 0.6983], [0.6477, 0.6918]]),
    },
    "dlib": {
        # Where dlib's points lie in the squares that CenterFace's landmarks give, on the same photos.
        "portrait": np.array([[0.6949, 0.4198], [0.5822, 0.4226], [0.2949, 0.4206], [0.4073, 0.423], [0.4957, 0.6371]]),
        "arcface": np.array([[0.7155, 0.4735], [0.5928, 0.4772], [0.2795, 0.4766], [0.4021, 0.4781], [0.4995, 0.7109]]),
        # dlib's mean face with its padding of a quarter on each side (`get_face_chip_details`).
        "dlib": (_CHIP + 0.25) / 1.5,
    },
}  # fmt: skip
"""Detector → template → [5, 2] where its landmarks lie in the square, which reaches from 0 to 1."""

FACENET_MARGIN = 32 / 160
"""FaceNet cuts along the box of the face, with this share of the crop left around it; nothing is rotated."""

CANVAS = 1.5
"""A crop is drawn with this much around it, for augmentation to move within."""

SMALL = 56
"""A face lower than this many of the detector's pixels is looked at again, enlarged: its landmarks are coarse."""

LOOKS = (224, 640, 1280, 2560)
"""Sizes in which a group photo is looked at, its longer side in pixels, up to the first in which it is not reduced."""

DETECTORS: dict[str, Callable[[np.ndarray], list[Face]]] = {
    "centerface": align.detect,
    "dlib": align.detect_dlib,
}
"""Photo uint8 RGB [h, w, 3] → faces, most confident first. A further one needs its row in `LANDMARKS`, too, and no more."""

FaceRule = Literal["central", "largest"]
Missed = Literal["centre", "skip", "error"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aligner:
    """How faces are found and brought into a template."""

    template: Template
    size: int
    """Side of the crop, pixels."""
    detector: str = "centerface"
    face: FaceRule = "central"
    """Which of several: nearest to the middle of the photo, or largest."""
    missed: Missed = "centre"
    """What becomes of a photo without a face: the square where faces usually are, nothing, or an error."""

    def __post_init__(self) -> None:
        if self.detector not in DETECTORS:
            raise ValueError(f"there is no detector {self.detector!r}; there are {', '.join(DETECTORS)}.")
        if self.template != "facenet" and self.template not in LANDMARKS[self.detector]:
            known = ", ".join([*LANDMARKS[self.detector], "facenet"])
            raise ValueError(f"there is no template {self.template!r} for {self.detector}; there are {known}.")
        if self.template == "facenet" and self.detector == "dlib":
            raise ValueError(
                "facenet crops follow the face's box, and dlib's is another: a tenth wider and a sixth lower than those "
                "that networks of this template were trained on. Use --detector centerface."
            )
        if self.size < 16:
            raise ValueError(f"size is {self.size} px: a face cannot be told from 15 px or fewer. Try 112.")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What was found in one photo."""

    faces: int
    """How many, before one was chosen."""
    face: Face | None
    """The one that was taken."""
    seen: tuple[Face, ...]
    """All of them, as the detector saw them."""


def find(photo: np.ndarray, aligner: Aligner) -> Found:
    """The face that a photo is of.

    A photo in which CenterFace sees nothing is looked at in 640 px; a face that is small in what the detector saw is looked
    at again in a square around it, so that its landmarks are as fine as those of a large one.

    Raises:
      ImportError: the detector is not installed.
      ValueError: not a photo.
    """
    if aligner.detector != "centerface":
        faces = DETECTORS[aligner.detector](photo)
        face = align.choose(faces, photo.shape, aligner.face)
        return Found(faces=len(faces), face=face, seen=tuple(faces))
    seen = 224
    faces = align.detect(photo, long_side=seen)
    if not faces and max(photo.shape[:2]) > seen:
        seen = 640
        faces = align.detect(photo, long_side=seen)
    face = align.choose(faces, photo.shape, aligner.face)
    if face is not None and _coarse(photo, face, seen):
        face = _again(photo, face) or face
    return Found(faces=len(faces), face=face, seen=tuple(faces))


def find_all(photo: np.ndarray, aligner: Aligner) -> list[Face]:
    """Every face of a photo, largest first; none is an empty list. The aligner's `face` and `missed` do not count.

    CenterFace looks at the photo in each size of `LOOKS`, since it finds faces of some 20 to 300 of its own pixels. A face
    that it sees in several is one face: the surest stays, after each small one was looked at again as `find` does.

    Raises:
      ImportError: the detector is not installed.
      ValueError: not a photo.
    """
    if aligner.detector != "centerface":
        return _each_once(DETECTORS[aligner.detector](photo))
    faces: list[Face] = []
    for seen in LOOKS:
        for face in align.detect(photo, long_side=seen):
            faces.append((_again(photo, face) or face) if _coarse(photo, face, seen) else face)
        if seen >= max(photo.shape[:2]):
            break
    return _each_once(faces)


def _each_once(faces: Sequence[Face]) -> list[Face]:
    """Largest first, each face once: of boxes that share most of the smaller one, or a third of both, the surest stays."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: -face.score):
        if not any(_one_face(face.box, other.box) for other in kept):
            kept.append(face)
    return sorted(kept, key=lambda face: -_area(face.box))


def _one_face(a: np.ndarray, b: np.ndarray) -> bool:
    shared = _area(np.concatenate([np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])]))
    return shared >= 0.3 * (_area(a) + _area(b) - shared) or shared >= 0.6 * min(_area(a), _area(b))


def _area(box: np.ndarray) -> float:
    return float(np.prod(np.maximum(box[2:] - box[:2], 0)))


def _coarse(photo: np.ndarray, face: Face, seen: int) -> bool:
    """Whether a face was so small in what the detector saw, the photo's longer side in `seen` pixels, that its landmarks
    are coarse."""
    return float(face.box[3] - face.box[1]) * seen / max(photo.shape[:2]) < SMALL


def _again(photo: np.ndarray, face: Face) -> Face | None:
    """The same face in a square of two and a half times its size."""
    side = 2.5 * float(max(face.box[2:] - face.box[:2]))
    left, top = np.maximum(0, np.floor((face.box[:2] + face.box[2:]) / 2 - side / 2)).astype(int)
    part = photo[top : top + int(side) + 1, left : left + int(side) + 1]
    shift = np.array([left, top], np.float64)
    middle = (face.box[:2] + face.box[2:]) / 2 - shift  # of the part only where the photo's border did not cut it

    def away(other: Face) -> float:
        return float(np.linalg.norm((other.box[:2] + other.box[2:]) / 2 - middle))

    closer = min(align.detect(np.ascontiguousarray(part)), key=away, default=None)
    if closer is None or away(closer) > side / 5:  # half of the face's size: then it is somebody else's
        return None
    return Face(box=closer.box + np.tile(shift, 2), landmarks=closer.landmarks + shift, score=closer.score)


def place(face: Face, aligner: Aligner) -> np.ndarray:
    """[2, 3] float64: points of the photo → points of the crop, in pixels."""
    if aligner.template == "facenet":
        corners = face.box.reshape(2, 2)
        inner = aligner.size * np.array([FACENET_MARGIN / 2, 1 - FACENET_MARGIN / 2])
        scale = (inner[1] - inner[0]) / np.maximum(corners[1] - corners[0], 1)
        return np.column_stack([np.diag(scale), inner[0] - scale * corners[0]])
    target = LANDMARKS[aligner.detector][aligner.template] * aligner.size
    return align.similarity_transform(face.landmarks, target)


def usual_place(square: Square | None, shape: tuple[int, ...], aligner: Aligner) -> np.ndarray:
    """Where the crop lies in a photo in which no face was found: where faces of its source are, or the middle.

    A source's square shows the portrait template; the others lie in it as their landmarks do.
    """
    if square is None:
        square = Square(x=shape[1] / 2, y=shape[0] / 2, side=min(shape[:2]))
        known = False
    else:
        known = True
    scale = aligner.size / square.side
    matrix = np.array([
        [scale, 0.0, aligner.size / 2 - scale * square.x], [0.0, scale, aligner.size / 2 - scale * square.y],
    ])  # fmt: skip
    if not known or aligner.template in ("portrait", "facenet"):
        return matrix
    here = LANDMARKS["centerface"]
    onto = align.similarity_transform(here["portrait"] * aligner.size, here[aligner.template] * aligner.size)
    return np.column_stack([onto[:, :2] @ matrix[:, :2], onto[:, :2] @ matrix[:, 2] + onto[:, 2]])


def draw(photo: np.ndarray, matrix: np.ndarray, size: int, around: float = 1.0) -> np.ndarray:
    """The crop that a placement gives, uint8 RGB [s, s, 3], s = crop_side(size, around)."""
    side = crop_side(size, around)
    shift = np.array([0.0, 0.0, (side - size) / 2])
    return align.warp(photo, matrix + np.stack([shift, shift]), (side, side))


# ---- photos of a source, aligned as they are read --------------------------------------------------------------------


class Tally:
    """What was found in the photos that were read so far: key → number of faces. Filled by many threads."""

    def __init__(self, aligner: Aligner) -> None:
        self._aligner = aligner
        self._faces: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, key: str, faces: int) -> None:
        with self._lock:
            self._faces[key] = faces

    def to_dict(self) -> dict[str, Any]:
        """JSON's types: the aligner's rules, photos read, in how many no face or several were found, and the first ten
        without one."""
        with self._lock:
            faces = dict(self._faces)
        missed = sorted(key for key, count in faces.items() if not count)
        return {
            "detector": self._aligner.detector, "template": self._aligner.template, "size": self._aligner.size,
            "face": self._aligner.face, "missed_rule": self._aligner.missed, "photos": len(faces), "missed": len(missed),
            "several": sum(count > 1 for count in faces.values()),
            "first_missed": missed[:10],
        }  # fmt: skip

    def __str__(self) -> str:
        found = self.to_dict()
        text = (
            f"a face was looked for in {found['photos']:,} photos by {found['detector']}; none in {found['missed']:,}"
        )
        if found["missed"]:
            text += f" (first {found['first_missed'][0]}), of which the usual place was taken"
        return f"{text}; several in {found['several']:,}, of which the {found['face']} one was taken"


def aligned(photos: sources.Photos, aligner: Aligner) -> sources.Photos:
    """The same photos, each aligned when it is read; `Photos.tally` counts what was found.

    Raises:
      ImportError: the detector is not installed.
      ValueError: from `read`, where no face is found and `aligner.missed` is "error".
    """
    if aligner.missed == "skip":
        raise ValueError("a source's photos cannot be skipped while they are read: use 'centre' or 'error'.")
    require(aligner.detector)
    tally = Tally(aligner)
    side = crop_side(aligner.size, CANVAS)

    def read_aligned(index: int) -> np.ndarray:
        photo = photos.read(index)
        found = find(photo, aligner)
        tally.add(str(photos.keys[index]), found.faces)
        if found.face is None and aligner.missed == "error":
            raise ValueError(
                "no face was found. Leave the photo out, or let the middle of it be taken: --missed centre."
            )
        if found.face is None:
            matrix = usual_place(photos.square_in(photo.shape[1]), photo.shape, aligner)
        else:
            matrix = place(found.face, aligner)
        return draw(photo, matrix, aligner.size, CANVAS)

    return dataclasses.replace(
        photos,
        read=read_aligned,
        square=Square(x=side / 2, y=side / 2, side=aligner.size),
        template=aligner.template,
        tally=tally,
        fingerprint=sources.fingerprint_of(photos.keys, photos.people, f"{photos.fingerprint} {aligner}"),
    )


def framed_for(
    photos: sources.Photos, preprocess: Preprocess, *, detector: str = "centerface", face: FaceRule = "central"
) -> sources.Photos:
    """Photos as an encoder with this `Preprocess` wants them: as they are where they fit, else aligned as they are read.

    Raises:
      ImportError: faces have to be found and the detector is not installed.
      ValueError: photos that were already cut to another template.
    """
    if photos.template == preprocess.template:
        return photos
    if photos.template is not None:
        raise ValueError(
            f"{photos.source} was aligned to the template {photos.template!r} and this encoder wants "
            f"{preprocess.template!r}. To train on these crops, add --preprocess.template {photos.template}; for one "
            "that is trained already, align the original photos: python launch.py align PHOTOS OUT --template "
            f"{preprocess.template} --size {preprocess.size}."
        )
    if preprocess.template == "portrait":
        return photos  # its square, or the middle of photos that are cropped tightly
    wanted = Aligner(template=preprocess.template, size=preprocess.size, detector=detector, face=face)
    return aligned(photos, wanted)


def require(detector: str) -> None:
    """Tells at once that a detector is not installed, before an hour of reading.

    Raises:
      ImportError: with what to install.
    """
    DETECTORS[detector](np.zeros((64, 64, 3), np.uint8))


# ---- a folder of aligned photos --------------------------------------------------------------------------------------


def align_folder(
    photos: sources.Photos, out: Path, aligner: Aligner, *, format: Literal["png", "jpg"] = "png",
    threads: int | None = None, progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Writes every photo's crop to OUT/KEY.png, and what was found to OUT/align.jsonl; goes on where it was stopped.

    A crop is written under another name and renamed, so that a file that is there is whole. OUT/align.json holds the
    settings from the start and the counts at the end.

    Args:
      photos: any source.
      out: a folder, made when missing.
      aligner: its `missed` may be "skip".
      format: "png" loses nothing; "jpg" (quality 95) takes a third of the room.
      threads: photos at once; two a core when not given.
      progress: show a bar.

    Returns:
      The card: settings, counts of photos, faces found, missed, several, unreadable (those that the source left out as
      corrupt are among them).

    Raises:
      ImportError: the detector is not installed.
      BlockingIOError: another process aligns into the same folder.
      ValueError: OUT holds crops of other settings or another source, or lies among the photos.
      OSError: a crop cannot be written; its photo is named.
    """
    require(aligner.detector)
    sources.require_outside(photos.source, out)
    card: dict[str, Any] = {
        "template": aligner.template, "size": aligner.size, "detector": aligner.detector, "face": aligner.face,
        "missed_rule": aligner.missed, "format": format, "source": photos.source, "fingerprint": photos.fingerprint,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    if not (out / CARD).exists() and any(entry.name != JOURNAL for entry in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no {CARD}: give a folder of its own.")
    lock = threading.Lock()
    with _alone(out) as journal:
        if (out / CARD).exists():
            _check_card(out, card)
        done = {entry["key"]: entry for entry in _journal(out / JOURNAL, mend=True) if _is_done(entry, out, format)}
        waiting = [index for index in range(len(photos)) if str(photos.keys[index]) not in done]
        if waiting:  # from here to the end the folder is not whole
            report.write_json(out / CARD, card)

        def one(index: int) -> None:
            entry = _align_one(photos, index, out, aligner, format)
            with lock:
                done[entry["key"]] = entry
                journal.write(json.dumps(entry) + "\n")
                journal.flush()

        with concurrent.futures.ThreadPoolExecutor(threads or 2 * (os.cpu_count() or 1)) as pool:
            try:
                for _ in sources.progress_bar(pool.map(one, waiting), len(waiting), "aligning", shown=progress):
                    pass
            finally:
                pool.shutdown(cancel_futures=True)  # or Ctrl-C would wait for every photo of the folder
    entries = list(done.values())
    card |= {
        "photos": len(entries),
        "written": sum(entry["outcome"] in ("face", "centre") for entry in entries),
        "missed": sum(entry["faces"] == 0 and entry["outcome"] != "unreadable" for entry in entries),
        "several": sum(entry["faces"] > 1 for entry in entries),
        "unreadable": sum(entry["outcome"] == "unreadable" for entry in entries)
        + sum(problem.reason.startswith("corrupt image") for problem in photos.problems),
    }
    report.write_json(out / CARD, card)
    return card


def finished(out: Path) -> int:
    """How many photos of a folder an earlier command has dealt with."""
    try:
        format = json.loads((out / CARD).read_text())["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return len({entry["key"] for entry in _journal(out / JOURNAL) if _is_done(entry, out, format)})


def _check_card(out: Path, card: Mapping[str, Any]) -> None:
    """Refuses a folder whose crops were made otherwise. How the source was called does not count, its fingerprint does."""
    try:
        before = dict(json.loads((out / CARD).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{out / CARD} does not read ({error}). Remove {out} and align again.") from error
    if before.get("missed_rule") == "error":
        before["missed_rule"] = card["missed_rule"]  # it ended there, and no crop depends on it
    changed = [name for name in card if name != "source" and before.get(name) != card[name]]
    if changed:
        now = "; ".join(f"{name}: {before.get(name)!r} there, {card[name]!r} now" for name in changed)
        raise ValueError(f"{out} holds crops made otherwise ({now}). Give another folder, or remove this one.")


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[TextIO]:
    """The journal, open to add to, while no other process has it."""
    with open(out / JOURNAL, "a", encoding="utf-8") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"another process aligns photos into {out}. Wait for it, stop it, or give another folder."
            ) from None
        yield journal


def _is_done(entry: Mapping[str, Any], out: Path, format: str) -> bool:
    """Whether a photo need not be looked at again: one that did not read may read now, and a crop may have been removed."""
    written = entry["outcome"] in ("face", "centre")
    return entry["outcome"] == "skipped" or (written and (out / f"{entry['key']}.{format}").exists())


def _align_one(photos: sources.Photos, index: int, out: Path, aligner: Aligner, format: str) -> dict[str, Any]:
    key = str(photos.keys[index])
    entry: dict[str, Any] = {"key": key, "faces": 0}
    try:
        photo = photos.read(index)
    except (OSError, ValueError) as error:
        return entry | {"outcome": "unreadable", "why": str(error)}
    found = find(photo, aligner)
    entry["faces"] = found.faces
    if found.face is not None:
        matrix = place(found.face, aligner)
        entry |= {
            "outcome": "face", "score": round(found.face.score, 4), "box": np.round(found.face.box, 2).tolist(),
            "landmarks": np.round(found.face.landmarks, 2).tolist(),
        }  # fmt: skip
    elif aligner.missed == "centre":
        matrix = usual_place(photos.square_in(photo.shape[1]), photo.shape, aligner)
        entry["outcome"] = "centre"
    elif aligner.missed == "skip":
        return entry | {"outcome": "skipped"}
    else:
        raise ValueError(f"{key}: no face was found. Choose what becomes of it: --missed skip, or --missed centre.")
    encoded = io.BytesIO()
    options: Mapping[str, Any] = {"format": "PNG"} if format == "png" else {"format": "JPEG", "quality": 95}
    Image.fromarray(draw(photo, matrix, aligner.size)).save(encoded, **options)
    try:
        report.write_bytes(out / f"{key}.{format}", encoded.getvalue())
    except OSError as error:
        raise OSError(error.errno, f"the crop of {key} cannot be written: {error.strerror}", error.filename) from error
    return entry


def _journal(path: Path, *, mend: bool = False) -> Iterator[dict[str, Any]]:
    """The entries of a journal. A last line that a kill cut off does not count; `mend` takes it off the file."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if mend and whole < len(data):
        with open(path, "r+b") as file:
            file.truncate(whole)
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            entry = json.loads(line)
            entry["key"], entry["outcome"], entry["faces"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: line {number} is damaged. Remove that line: its photo will be aligned again."
            ) from error
        yield entry

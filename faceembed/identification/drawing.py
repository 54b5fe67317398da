"""A photo with the faces in it named: a picture to look at, beside the numbers.

    picture = named(photo, boxes, labels, good)
    for number, label in legend(photo.shape, boxes, labels).items():
        print(number, label)

A name is written in full or not at all. Where there is no room for it between its neighbours, or no font of this machine
has its letters, the face gets its number, counted from 1 in the order given, and `legend` says whose it is.
"""

import dataclasses
import functools
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont, features

GOOD, NOT_GOOD = (0, 90, 200), (250, 160, 0)
"""A blue and an orange that are told apart with any colour vision; the lines differ, too: solid and dashed."""

INK = {GOOD: (255, 255, 255), NOT_GOOD: (0, 0, 0)}
"""Text on a plate of each colour, and the rim of its line: a contrast of 6:1 and 10:1, whatever lies beneath."""

READABLE, SMALLEST = 12, 8
"""Size of letters, pixels: text does not go below the first unless the picture is tiny, and never below the second."""

# Pillow's own font has little more than ASCII. Pillow looks for the others by name where Linux, macOS and Windows keep
# fonts; the first that has every letter of a name writes it.
FONTS = (
    "DejaVuSans.ttf", "arial.ttf", "Arial Unicode.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "msyh.ttc",
    "YuGothM.ttc", "malgun.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc", "wqy-microhei.ttc",
    "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "NotoSansArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf", "NotoSansThai-Regular.ttf", "Nirmala.ttf", "unifont.ttf",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plate:
    """A text and the ground it stands on."""

    text: str
    font: ImageFont.FreeTypeFont
    start: tuple[float, float]
    """Of the base line, from the plate's corner."""
    width: int
    height: int
    left: int = 0
    top: int = 0

    @property
    def box(self) -> np.ndarray:
        return np.array([self.left, self.top, self.left + self.width, self.top + self.height])


def named(photo: np.ndarray, boxes: ArrayLike, labels: Sequence[str], good: Sequence[bool]) -> np.ndarray:
    """A copy of a photo with a box and a name for each face.

    Args:
      photo: uint8 RGB [h, w, 3].
      boxes: [m, 4] left, top, right, bottom in pixels of the photo; what lies outside of it is cut off.
      labels: [m] names in any script; "" draws the box alone.
      good: [m] bool: blue and solid, or orange and dashed for a face that was not recognised.

    Returns:
      uint8 RGB [h, w, 3]. No text leaves the picture, covers another, or, but for a number, another's face.

    Raises:
      ValueError: not a photo, a box that is none, or lengths differ.
    """
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
        raise ValueError(f"a photo is uint8 RGB [h, w, 3], this one is {photo.dtype} {list(photo.shape)}.")
    where = _checked(photo.shape, boxes, labels)
    if len(good) != len(where):
        raise ValueError(f"there are {len(where)} boxes and {len(good)} of `good`: give one for each.")
    picture = Image.fromarray(photo)
    pen = ImageDraw.Draw(picture)
    colours = [GOOD if fine else NOT_GOOD for fine in good]
    for box, colour in zip(where, colours, strict=True):
        _frame(pen, box, colour, photo.shape)
    for plate, colour in zip(_laid_out(photo.shape, where, labels), colours, strict=True):
        if plate is not None:
            left, top, right, bottom = plate.box.tolist()
            pen.rectangle((left, top, right - 1, bottom - 1), fill=colour)
            at = (left + plate.start[0], top + plate.start[1])
            pen.text(at, plate.text, fill=INK[colour], font=plate.font, anchor="ls")
    return np.asarray(picture).copy()


def legend(shape: Sequence[int], boxes: ArrayLike, labels: Sequence[str]) -> dict[int, str]:
    """Number → label of the faces whose label `named` does not write in a photo of this shape."""
    plates = _laid_out(shape, _checked(shape, boxes, labels), labels)
    return {
        number: label
        for number, (label, plate) in enumerate(zip(labels, plates, strict=True), start=1)
        if _clean(label) and (plate is None or plate.text != _clean(label))
    }


def _checked(shape: Sequence[int], boxes: ArrayLike, labels: Sequence[str]) -> np.ndarray:
    """[m, 4] the boxes inside the picture."""
    where = np.asarray(boxes, np.float64).reshape(-1, 4) if np.size(boxes) else np.zeros((0, 4))
    if len(where) != len(labels):
        raise ValueError(f"there are {len(where)} boxes and {len(labels)} labels: give one for each.")
    if not np.isfinite(where).all() or (where[:, 2:] < where[:, :2]).any():
        raise ValueError(
            "a box is left, top, right, bottom in pixels: finite, and right and bottom not below the others."
        )
    return np.clip(where, 0, np.array([shape[1], shape[0], shape[1], shape[0]]))


def _frame(pen: ImageDraw.ImageDraw, box: np.ndarray, colour: tuple[int, int, int], shape: Sequence[int]) -> None:
    """A line within a rim of the contrary brightness: one of them is seen on any ground. Dashes leave the rim between."""
    width = max(1, round(min(max(shape[:2]) / 350, (box[3] - box[1]) / 12)))
    rim = max(1, width // 3)
    left, top, right, bottom = np.round(box).astype(int).tolist()

    def fill(x0: int, y0: int, x1: int, y1: int, shade: tuple[int, int, int]) -> None:
        if x1 > x0 and y1 > y0:
            pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=shade)

    def edges(out: int, into: int) -> Iterator[tuple[int, int, int, int]]:
        x0, y0, x1, y1 = left - out, top - out, right + out, bottom + out
        yield x0, y0, x1, top + into
        yield x0, bottom - into, x1, y1
        yield x0, y0, left + into, y1
        yield right - into, y0, x1, y1

    for edge in edges(rim, width + rim):
        fill(*edge, INK[colour])
    dash = 4 * width
    for x0, y0, x1, y1 in edges(0, width):
        if colour == GOOD:
            fill(x0, y0, x1, y1, colour)
        elif x1 - x0 > y1 - y0:
            for start in range(x0, x1, 2 * dash):
                fill(start, y0, min(start + dash, x1), y1, colour)
        else:
            for start in range(y0, y1, 2 * dash):
                fill(x0, start, x1, min(start + dash, y1), colour)


# ---- where the names go ----------------------------------------------------------------------------------------------


def _laid_out(shape: Sequence[int], boxes: np.ndarray, labels: Sequence[str]) -> list[_Plate | None]:
    """For each face its name, else its number, else nothing: the first that has room. Those given first choose first."""
    taken = np.zeros((0, 4))
    plates: list[_Plate | None] = []
    for number, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        others = np.delete(boxes, number, axis=0)
        plate = _placed(shape, box, _clean(label), str(number + 1), others, taken) if _clean(label) else None
        plates.append(plate)
        if plate is not None:
            taken = np.concatenate([taken, plate.box[None]])
    return plates


def _placed(
    shape: Sequence[int], box: np.ndarray, label: str, number: str, others: np.ndarray, taken: np.ndarray
) -> _Plate | None:
    free = np.concatenate([others, taken])
    for text, clear, on_it in ((label, free, False), (number, free, False), (number, taken, True)):
        for size in _sizes(shape, box):
            plate = _plate(text, size)
            if plate is None:
                break
            for left, top in _places(shape, box, plate, on_it=on_it):
                there = dataclasses.replace(plate, left=left, top=top)
                if not _touches(there.box, clear):
                    return there
    return None


def _sizes(shape: Sequence[int], box: np.ndarray) -> list[int]:
    """Of letters, the wanted one first: a fifth of the face, and readable where the picture is shown on a screen."""
    side = max(shape[:2])
    least = max(READABLE, round(side / 80))
    wanted = float(np.clip((box[3] - box[1]) / 5, least, max(least, side / 30)))
    sizes = [round(wanted), round((wanted + least) / 2), least]
    if min(shape[:2]) < 10 * READABLE:
        sizes += [10, SMALLEST]
    return sorted(set(sizes), reverse=True)


def _plate(text: str, size: int) -> _Plate | None:
    """The text of that size and the ground around it, not placed yet; None where no font has its letters."""
    font = _font(text, size)
    if font is None:
        return None
    x0, y0, x1, y1 = font.getbbox(text, anchor="ls")
    ascent, descent = font.getmetrics()
    above, below, pad = max(ascent, -y0), max(descent, y1), max(1, size // 5)
    width, height = int(np.ceil(x1 - x0)) + 2 * pad, int(np.ceil(above + below)) + 2
    return _Plate(text=text, font=font, start=(pad - x0, 1 + above), width=width, height=height)


def _places(shape: Sequence[int], box: np.ndarray, plate: _Plate, *, on_it: bool) -> Iterator[tuple[int, int]]:
    """Corners of the plate, the best first: above the box, below, beside; within it where the face remains to be seen, or
    `on_it` whatever it hides."""
    room_x, room_y = shape[1] - plate.width, shape[0] - plate.height
    if room_x < 0 or room_y < 0:
        return
    left, top, right, bottom = np.concatenate([np.floor(box[:2]), np.ceil(box[2:])]).tolist()
    along = [left, (left + right - plate.width) / 2, right - plate.width]
    for y in (top - plate.height, bottom):
        if 0 <= y <= room_y:
            yield from ((int(np.clip(x, 0, room_x)), int(y)) for x in along)
    for x in (right, left - plate.width):
        if 0 <= x <= room_x:
            yield from ((int(x), int(np.clip(y, 0, room_y))) for y in (bottom - plate.height, top))
    for y in (bottom - plate.height, top) if on_it or 4 * plate.height <= bottom - top else ():
        yield from ((int(np.clip(x, 0, room_x)), int(np.clip(y, 0, room_y))) for x in along)


def _touches(box: np.ndarray, others: np.ndarray) -> bool:
    return bool(((others[:, :2] < box[2:]) & (others[:, 2:] > box[:2])).all(axis=1).any())


# ---- letters ---------------------------------------------------------------------------------------------------------


def _clean(label: str) -> str:
    """One line without what is not printed."""
    text = unicodedata.normalize("NFC", " ".join(label.split()))
    return "".join(letter for letter in text if unicodedata.category(letter) not in ("Cc", "Cf", "Cs"))


def _font(text: str, size: int) -> ImageFont.FreeTypeFont | None:
    """The first font that has every letter, or None."""
    if _needs_shaping(text) and not (features.check("raqm") and features.check("fribidi")):
        return None
    letters = frozenset(text) - {" "}
    for name in ("", *FONTS):
        if _loaded(name, 16) is not None and all(_has(name, letter) for letter in letters):
            return _loaded(name, size)
    return None


def _needs_shaping(text: str) -> bool:
    """Whether letters run from right to left or join: Pillow alone would write them in the wrong order or apart."""
    return any(
        unicodedata.bidirectional(letter) in ("R", "AL") or unicodedata.category(letter) in ("Mn", "Mc")
        for letter in text
    )


@functools.lru_cache(maxsize=512)
def _loaded(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        font = ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None
    return font if isinstance(font, ImageFont.FreeTypeFont) else None


@functools.lru_cache(maxsize=4096)
def _has(name: str, letter: str) -> bool:
    """Whether a font draws a letter otherwise than one that no font has (U+10FFFF is none)."""
    font = _loaded(name, 16)
    assert font is not None
    one, none = font.getmask(letter), font.getmask("\U0010ffff")
    return one.size != none.size or bytes(one) != bytes(none)

"""Is this photo of a face good enough to enrol, or to decide on?  (NumPy and Pillow alone.)

    quality = measure(crop, face=face)
    quality.trouble()   # None, or "the face is 17 px high, at least 32 are needed"

A blurred or tiny face does worse than be missed: to some encoders all blurred faces look alike, and two strangers' blurred
photos match. `python -m experiments.photo_quality` measures that, and where the limits and the score come from. What is not
seen here: noise and blocks of JPEG are details, too; a face that is turned, covered or lit from one side may be sharp.
"""

import dataclasses

import numpy as np
from PIL import Image

from faceembed.data.align import Face

SIDE = 64
"""Crops are measured at this side, pixels, whatever an encoder's is: finer details say little of who it is."""

SHARP = 0.5
"""Sharpness of the median photo in LFW; from here on the score is 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a photo needs for a decision to rest on it. Just below these, dlib's network misses nearly three times as many
    genuine pairs at an FMR of 0.1 % as with the photos as they were, and two such photos of two people match three times as
    often."""

    face: float = 32.0
    """Height of the face's box, pixels of the photo."""
    sharpness: float = 0.35
    """See `Quality.sharpness`; of LFW's photos 0.2 % are below it in the template "portrait", 0.4 % in dlib's."""


LIMITS = Limits()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """What a photo of a face is good for."""

    face: float
    """Height of the face's box, pixels of the photo; where no detector ran, the side of the crop."""
    sharpness: float
    """Share of the differences between neighbouring pixels that a blur would take away, in [0, 1]: 0.5 in an ordinary
    photo, 0.3 to 0.4 out of focus by 1 to 1.5 % of the face's height, 0.15 by 4 %. Contrast and brightness do not enter."""
    confidence: float
    """Of the detector, for display: 1 where none ran, and dlib's is a margin that may exceed 1."""

    @property
    def score(self) -> float:
        """In (0, 1], the weight of a template among others of its person: sharpness in units of an ordinary photo's."""
        return float(np.clip(self.sharpness / SHARP, 0.01, 1.0))

    def trouble(self, limits: Limits = LIMITS) -> str | None:
        """Why no decision should rest on this photo, or None."""
        if self.face < limits.face:
            return f"the face is {_below(self.face, limits.face, 0)} px high, at least {limits.face:g} are needed"
        if self.sharpness < limits.sharpness:
            found = _below(self.sharpness, limits.sharpness, 2)
            return f"the face is too blurred: sharpness {found}, at least {limits.sharpness:g} is needed"
        return None


def _below(value: float, limit: float, digits: int) -> str:
    """A value below a limit, with as many digits as show that it is."""
    while float(f"{value:.{digits}f}") >= limit and digits < 9:
        digits += 1
    return f"{value:.{digits}f}"


def measure(crop: np.ndarray, *, face: Face | None = None) -> Quality:
    """The quality of one crop.

    Args:
      crop: uint8 RGB [s, s, 3], in any encoder's template.
      face: what the detector found; None where none ran.

    Raises:
      ValueError: not a square crop.
    """
    if crop.dtype != np.uint8 or crop.ndim != 3 or crop.shape[2] != 3 or not 0 < crop.shape[0] == crop.shape[1]:
        raise ValueError(f"a crop is uint8 RGB [s, s, 3], this one is {crop.dtype} {list(crop.shape)}.")
    return Quality(
        face=float(crop.shape[0] if face is None else face.box[3] - face.box[1]),
        sharpness=_sharpness(crop),
        confidence=1.0 if face is None else float(face.score),
    )


def _sharpness(crop: np.ndarray) -> float:
    """The less of both directions' shares, since a movement blurs along its own (after Crété et al. 2007, "The blur effect:
    perception and estimation with a new no-reference perceptual blur metric", who call its complement blur).

    Where a photo is blurred already, blurring it again over 5 pixels changes little.
    """
    grey = Image.fromarray(crop).convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    edge = SIDE // 8
    middle = np.asarray(grey, np.float64)[edge:-edge, edge:-edge]  # hair and background have their own focus
    shares = []
    for lines in (middle, middle.T):
        before = np.abs(np.diff(lines, axis=1))
        padded = np.pad(lines, ((0, 0), (2, 2)), mode="symmetric")
        blurred = np.lib.stride_tricks.sliding_window_view(padded, 5, axis=1).mean(axis=-1)
        lost = np.maximum(before - np.abs(np.diff(blurred, axis=1)), 0)
        total = float(before.sum())
        shares.append(float(lost.sum()) / total if total else 0.0)
    return min(shares)

"""The contract between a photograph and an encoder: which square of the photo, how large, in which numbers.

A `Preprocess` is stored with every checkpoint, so that loading a checkpoint is enough to embed a photo the way the
encoder was trained to see it.
"""

import dataclasses
import math
from typing import Any, Literal

import numpy as np
from PIL import Image

Template = Literal["portrait", "arcface", "facenet", "dlib"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square:
    """A square of a photo, in pixels from its top left corner."""

    x: float
    """Centre, to the right."""
    y: float
    """Centre, downwards."""
    side: float
    """Length of a side."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How a photo becomes the encoder's input."""

    template: Template = "portrait"
    """Which part of the head fills the square. "portrait" is what aligned CelebA and LFW are cut to by their squares; the
    others (InsightFace's, FaceNet's, dlib's) need each face found, see `data.align`."""
    size: int = 64
    """Side of the square the encoder sees, in pixels."""
    mean: float | tuple[float, float, float] = 127.5
    """Subtracted from every channel (0-255); or one number for red, green and blue each."""
    scale: float = 127.5
    """Divides after the subtraction."""
    colour: Literal["rgb", "bgr"] = "rgb"
    """Order of the channels the encoder was trained on. Photos are RGB until here."""
    flip: Literal["none", "sum", "concat"] = "sum"
    """Fusion of a photo's embedding with its mirror image's: sum keeps d numbers, concat gives 2d."""

    def __post_init__(self) -> None:
        if self.size < 16:
            raise ValueError(
                f"preprocess.size is {self.size} px: a face cannot be told from 15 px or fewer. Try --preprocess.size 64."
            )
        means = self.mean if isinstance(self.mean, tuple) else (self.mean,)
        if len(means) not in (1, 3) or not all(math.isfinite(mean) for mean in means):
            raise ValueError(
                f"preprocess.mean is {self.mean}: give a number of 0-255, such as 127.5, or one for red, green and blue."
            )
        if not 0 < self.scale < math.inf:
            raise ValueError(f"preprocess.scale is {self.scale}: it divides, so give a positive number such as 127.5.")


PUBLISHED: dict[str, Preprocess] = {
    "dlib": Preprocess(template="dlib", size=150, mean=(122.782, 117.001, 104.298), scale=256.0, flip="none"),
    "insightface": Preprocess(template="arcface", size=112, mean=127.5, scale=127.5, flip="sum"),
    "facenet-pytorch": Preprocess(template="facenet", size=160, mean=127.5, scale=128.0, flip="none"),
}
"""How photos are read for networks that others published."""

FRAMINGS: dict[str, tuple[int, Square]] = {
    # Width of the photo the square is given for; both show the same part of a head.
    "celeba": (89, Square(x=44.5, y=62.0, side=64.0)),
    "lfw": (250, Square(x=125.0, y=127.0, side=141.0)),
}
"""Where the "portrait" template lies in sets that come aligned: CelebA as aligned by its authors, deep-funneled LFW."""


def framed_square(name: str, width: int) -> Square:
    """The square of a named framing in a photo of this width, in pixels.

    Raises:
      ValueError: if there is no such framing.
    """
    if name not in FRAMINGS:
        raise ValueError(f"framing {name!r} is not one of {', '.join(FRAMINGS)}; for tight crops of a face give None.")
    native, square = FRAMINGS[name]
    factor = width / native
    return Square(x=square.x * factor, y=square.y * factor, side=square.side * factor)


def crop_side(size: int, margin: float) -> int:
    """Side of a crop with room around it, in pixels: about size · margin, and as many pixels on one side as on the other.

    An odd number of pixels too many would put the middle of the crop half a pixel off, and blur every training view.
    """
    return size + 2 * round(size * (margin - 1) / 2)


def crop_square(photo: np.ndarray, square: Square | None, size: int, margin: float = 1.0) -> np.ndarray:
    """Cuts a square out of a photo and resizes it.

    Args:
      photo: uint8 RGB [h, w, 3].
      square: where; None takes the largest centred square.
      size: side of the result at margin 1, in pixels.
      margin: enlarges the square and the result alike, so that the central size × size pixels do not change scale.

    Returns:
      uint8 RGB [s, s, 3], s = crop_side(size, margin). Pixels outside the photo repeat its edge.
    """
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
        raise ValueError(f"photo is {photo.dtype} {photo.shape}: expected uint8 RGB [h, w, 3], values 0-255.")
    height, width = photo.shape[:2]
    if square is None:
        square = Square(x=width / 2, y=height / 2, side=min(height, width))
    out = crop_side(size, margin)
    side = square.side * out / size
    left, top = square.x - side / 2, square.y - side / 2
    pad = int(np.ceil(max(0, -left, -top, left + side - width, top + side - height)))
    if pad:
        photo = np.pad(photo, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
        left, top = left + pad, top + pad
    # `box` takes fractions of a pixel, and a reducing resize filters over every source pixel (antialiasing).
    resized = Image.fromarray(photo).resize(
        (out, out), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )
    return np.asarray(resized)


def normalize(preprocess: Preprocess, images: Any) -> Any:
    """RGB [b, h, w, 3] in 0-255 → the encoder's input, float32 (float64 stays). Works on NumPy and JAX arrays."""
    images = images.astype(np.promote_types(images.dtype, np.float32))
    images = (images - np.asarray(preprocess.mean, images.dtype)) / preprocess.scale
    return images[..., ::-1] if preprocess.colour == "bgr" else images

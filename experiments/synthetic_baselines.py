"""What do methods that know nothing of faces reach on the synthetic source?  (About a minute on 2 cores.)

    python experiments/synthetic_baselines.py [--people 1000] [--photos 8] [--sheet faces.jpg]

Pairs of photos of people who were held out, half of them of one person. Each method turns a photo into a vector, the
distance of two vectors is compared with a threshold, and threshold and principal components come from the training
people alone. A network's accuracy on this source says something only where it is well above these: 75 % is the most
that any of them may reach, and a test holds the renderer to it.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from faceembed.data import synthetic

Transform = Callable[[np.ndarray], np.ndarray]


def pairs_in_blocks(people: int, photos: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Balanced pairs in blocks of two people; no person is in two blocks, so blocks are independent.

    Args:
      people: how many people, their photos stored person after person; an odd last one is left out.
      photos: photos a person, ≥ 2; an odd last one is left out.
      seed: draws who meets whom, and which photos.

    Returns:
      (a, b, same): [people // 2, 2 * (photos // 2 * 2)] photo indices of the two sides, and bool; a row is a block.
    """
    rng = np.random.default_rng(seed)
    half = photos // 2
    couples = rng.permutation(people)[: people // 2 * 2].reshape(-1, 2)
    shots = rng.permuted(np.tile(np.arange(photos), (len(couples), 2, 1)), axis=-1)
    index = couples[:, :, None] * photos + shots
    one, other = index[:, 0], index[:, 1]
    a = np.concatenate([one[:, :half], other[:, :half], one[:, : 2 * half]], axis=1)
    b = np.concatenate([one[:, half : 2 * half], other[:, half : 2 * half], other[:, : 2 * half]], axis=1)
    same = np.broadcast_to(np.arange(4 * half) < 2 * half, a.shape)
    return a, b, same


def best_threshold(distance: np.ndarray, same: np.ndarray) -> float:
    """The threshold with the most pairs on the right side (same: distance ≤ threshold); the lowest of several."""
    order = np.argsort(distance, kind="stable")
    right = np.cumsum(np.where(same[order], 1, -1))
    last = np.r_[np.diff(distance[order]) > 0, True]
    best = int(np.argmax(np.where(last, right, -len(right))))
    return float(distance[order][best])


def verify(transform: Transform, train: np.ndarray, test: np.ndarray, photos: int) -> tuple[float, float]:
    """Accuracy on the test people's pairs at the training people's threshold, and its standard error.

    The error is that of the mean over blocks (ddof = 1): pairs that share people are not independent, blocks are. It
    does not include the choice of threshold.
    """
    a, b, same = pairs_in_blocks(len(train) // photos, photos, seed=1)
    vectors = transform(train)
    threshold = best_threshold(np.linalg.norm(vectors[a] - vectors[b], axis=-1).ravel(), same.ravel())
    a, b, same = pairs_in_blocks(len(test) // photos, photos, seed=2)
    vectors = transform(test)
    right = ((np.linalg.norm(vectors[a] - vectors[b], axis=-1) <= threshold) == same).mean(axis=1)
    return float(right.mean()), float(right.std(ddof=1) / math.sqrt(len(right)))


def mean_colour(images: np.ndarray) -> np.ndarray:
    """[n, h, w, 3] uint8 → [n, 3]."""
    return images.mean(axis=(1, 2), dtype=np.float32)


def centre_colour(images: np.ndarray) -> np.ndarray:
    """The mean colour of the middle of the picture, which is mostly skin: [n, h, w, 3] uint8 → [n, 3]."""
    h, w = images.shape[1:3]
    return mean_colour(images[:, h // 3 : 2 * h // 3, w // 3 : 2 * w // 3])


def raw_pixels(images: np.ndarray) -> np.ndarray:
    """Every pixel, each picture and channel standardised, unit length: [n, h, w, 3] uint8 → [n, h * w * 3]."""
    x = images.astype(np.float32)
    x = (x - x.mean(axis=(1, 2), keepdims=True)) / (x.std(axis=(1, 2), keepdims=True) + 1e-3)
    return x.reshape(len(x), -1) / math.sqrt(x[0].size)


def fit_pca(images: np.ndarray, dimensions: int, *, whiten: bool) -> Transform:
    """Principal components of `raw_pixels` (Turk and Pentland 1991, eigenfaces), unit length, fitted on `images`."""
    x = raw_pixels(images)
    centre = x.mean(axis=0)
    # The Gram matrix of a few thousand photos is far smaller than the covariance of 12,288 pixels.
    sample = (x - centre)[:: max(1, len(x) // 2000)]
    values, vectors = np.linalg.eigh(sample @ sample.T)
    values, vectors = values[::-1][:dimensions], vectors[:, ::-1][:, :dimensions]
    components = sample.T @ vectors / np.sqrt(values)
    if whiten:
        components = components / np.sqrt(values)

    def transform(images: np.ndarray) -> np.ndarray:
        y = (raw_pixels(images) - centre) @ components
        return y / np.linalg.norm(y, axis=1, keepdims=True)

    return transform


def run(*, people: int, photos: int, size: int, seed: int) -> dict[str, tuple[float, float]]:
    """{method: (accuracy, standard error)}; half of the people train, the other half are held out."""
    images = synthetic.render_all(seed, people, photos, size)
    train, test = images[: people // 2 * photos], images[people // 2 * photos :]
    methods: dict[str, Transform] = {
        "mean colour": mean_colour,
        "mean colour of the centre": centre_colour,
        "raw pixels": raw_pixels,
        "PCA, 64 components": fit_pca(train, 64, whiten=False),
        "PCA, 64 components, whitened": fit_pca(train, 64, whiten=True),
    }
    return {name: verify(transform, train, test, photos) for name, transform in methods.items()}


def contact_sheet(seed: int, people: int, photos: int, size: int) -> Image.Image:
    """A row a person."""
    faces = synthetic.render_all(seed, people, photos, size).reshape(people, photos, size, size, 3)
    rows = faces.transpose(0, 2, 1, 3, 4).reshape(people * size, photos * size, 3)
    return Image.fromarray(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=1000, help="half train, half are held out")
    parser.add_argument("--photos", type=int, default=8, help="photos a person, even")
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--sheet", type=Path, help="draw a contact sheet of 8 people into this file, and no more")
    flags = parser.parse_args()
    if flags.sheet is not None:
        contact_sheet(flags.seed, people=8, photos=10, size=flags.size).save(flags.sheet, optimize=True, quality=85)
        return
    if flags.people < 8 or flags.photos < 2:
        parser.error("pairs need --people 8 or more and --photos 2 or more.")
    table = run(people=flags.people, photos=flags.photos, size=flags.size, seed=flags.seed)
    held_out = flags.people - flags.people // 2
    pairs = held_out // 2 * (flags.photos // 2 * 4)
    print(f"{pairs} pairs of {held_out} held-out people, half of them of one person; ± is one standard error.")
    for name, (accuracy, error) in table.items():
        print(f"{name:<30} {100 * accuracy:5.1f} % ± {100 * error:.1f}")
    if flags.json is not None:
        flags.json.write_text(json.dumps({n: {"accuracy": a, "standard_error": e} for n, (a, e) in table.items()}))


if __name__ == "__main__":
    main()

"""How long does verification take, and in how much memory?  (2 min on 2 cores.)

    python -m experiments.benchmarks.verification

A list: six heads on 6,000 pairs of 128-D in ten folds, as LFW View 2 has them, each fold's heads fitted on the other nine,
with 1,000 draws of people for the bands. Bar: 60 s on 2 cores.

Every image against every other: 13,233 synthetic embeddings of 128 numbers, of 5,749 people with as many images each as a
power law gives them (LFW's size and shape): 87.5 million comparisons, three target FMRs, 1,000 draws of people for the
intervals and as many for the band around the ROC. Bars for the head on the distance, on 2 cores: 60 s and 1 GB, the second
being the peak of the whole process, interpreter and imports included.

Time and memory are those of one call in a new process. `logistic_abs` reads |f(a) - f(b)|, which is no matrix product.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks import harness
from faceembed.verification import Head, compare, dense

D = 128
LISTED = ("threshold", "logistic_distance", "whitened_distance", "logistic_abs", "logistic_product", "logistic_chi2")
BARS = {"threshold": (60.0, 1.0), "logistic_abs": (None, None)}
"""head -> bars: seconds, GB."""


def photographed(images: int, people: int) -> np.ndarray:
    """[images] person ids: everyone has one image, and the others are shared out by a power law."""
    share = np.arange(1, people + 1) ** -0.85
    taken = np.rint(np.cumsum(share / share.sum()) * (images - people)).astype(int)
    return np.repeat(np.arange(people), 1 + np.diff(taken, prepend=0))


def faces(images: int, people: int) -> tuple[np.ndarray, np.ndarray]:
    """(unit vectors [images, D] float32, person ids [images])."""
    rng = np.random.default_rng(0)
    who = photographed(images, people)
    emb = rng.normal(size=(people, D))[who] + rng.normal(size=(images, D))
    return (emb / np.linalg.norm(emb, axis=1, keepdims=True)).astype(np.float32), who


def head(name: str) -> Head:
    """A head with made-up weights: what it costs does not depend on them."""
    feature, size = {"threshold": ("squared_distance", 1), "logistic_abs": ("abs_difference", D)}[name]
    return Head(
        name=name,
        feature=feature,
        weight=(-1.0,) * size,
        intercept=0.0,
        threshold=-1.0,
        calibrated=False,
        dim=D,
    )


def peak_gigabytes() -> float | None:
    """The most memory that this process has held, all of it; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    # Not getrusage's ru_maxrss: a new process inherits its parent's.
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1e9


def once(name: str, images: int, people: int, draws: int) -> dict[str, Any]:
    """Seconds of one comparison, the peak memory of its process in GB, and how many pairs were compared."""
    emb, who = faces(images, people)
    began = time.perf_counter()
    results = dense.compare_all(emb, who, {name: head(name)}, draws=draws)
    seconds = time.perf_counter() - began
    return {
        "comparisons": results.n_genuine + results.n_impostor,
        "genuine": results.n_genuine,
        "draws": draws,
        "seconds": seconds,
        "GB": peak_gigabytes(),
    }


def listed(pairs: int, people: int, draws: int) -> dict[str, Any]:
    """Seconds of one comparison of six heads on a list in ten folds, and the peak memory of its process in GB."""
    rng = np.random.default_rng(0)
    fold = np.arange(pairs) % 10
    # Nobody is in two folds.
    a = 10 * rng.integers(0, people // 10, pairs) + fold
    same = np.arange(pairs) // 10 % 2 == 0
    b = np.where(same, a, (a + 10 * rng.integers(1, people // 10, pairs)) % people)
    centre = rng.normal(size=(people, D))
    one, other = (centre[who] + 1.5 * rng.normal(size=(pairs, D)) for who in (a, b))
    began = time.perf_counter()
    compare(one, other, same, a, b, folds=fold, heads=LISTED, draws=draws)
    seconds = time.perf_counter() - began
    return {
        "comparisons": pairs,
        "genuine": int(same.sum()),
        "draws": draws,
        "seconds": seconds,
        "GB": peak_gigabytes(),
    }


def run(*, quick: bool = False) -> list[dict[str, Any]]:
    """A row for six heads on a list, and a row a head for all pairs."""
    size = (600, 200, 100) if quick else (13_233, 5_749, 1000)
    many = (400, 200, 50) if quick else (6000, 4000, 1000)
    rows = [{"head": f"{len(LISTED)} on a list", **harness.fresh(listed, *many), "bar s": 60.0, "bar GB": None}]
    for name, (seconds, memory) in BARS.items():
        row = harness.fresh(once, name, *size)
        rows.append({"head": name, **row, "bar s": seconds, "bar GB": memory})
    return rows


if __name__ == "__main__":
    harness.main(run)

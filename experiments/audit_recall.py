"""Labels that are wrong on purpose: how many does `launch.py data audit` list, and how many right ones beside them?

    python launch.py data prepare lfw --archive lfw-deepfunneled.tgz
    python launch.py embed dlib lfw --out lfw.npz
    python -m experiments.audit_recall lfw.npz

Of the photos of people with three or more, 200 are put into the folder of another person with two or more, drawn at random;
ten times. LFW's own labels are taken for right, so that its own errors count against the labels.
"""

import sys
from collections.abc import Sequence

import numpy as np

from faceembed.audit import labels

DRAWS, MOVED = 10, 200


def moved_labels(identity: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[n] order of photos by new label, [n] new labels in it, [n] which were moved."""
    rng = np.random.default_rng(seed)
    count = np.bincount(identity)
    photos = rng.permutation(np.flatnonzero(count[identity] >= 3))[:MOVED]
    label = identity.copy()
    label[photos] = identity[rng.permutation(np.flatnonzero(count[identity] >= 2))[:MOVED]]
    order = np.argsort(label, kind="stable")
    _, people = np.unique(label[order], return_inverse=True)
    return order, people, (label != identity)[order]


def main(arguments: Sequence[str]) -> None:
    """Prints a line a draw and their mean."""
    with np.load(arguments[0], allow_pickle=False) as file:
        emb, identity = file["embedding"], file["identity"]
    rows = []
    for seed in range(DRAWS):
        order, people, moved = moved_labels(identity, seed)
        x, _ = labels.centred(emb[order], people)
        rho = labels.pair_cosine(x, people)
        errors, _ = labels.label_errors(x, people, *labels.nearest_people(x, people, rho=rho), rho=rho)
        hit = moved[errors.photo]
        right = errors.somebody & hit
        same = identity[order][errors.photo]  # whose the photo is, by LFW
        looks_like = np.array([np.bincount(identity[order][people == person]).argmax() for person in errors.looks_like])
        rows.append([moved.sum(), len(hit), hit.sum(), hit[: MOVED // 2].mean(), (looks_like == same)[right].mean()])
        print("moved {}, listed {}, of which moved {}; of the first 100 {:.0%}; named rightly {:.0%}".format(*rows[-1]))
    total = np.array(rows, float)
    found = total[:, 2] / total[:, 0]
    print(
        f"listed of those moved: {total[:, 2].sum() / total[:, 0].sum():.1%} ({found.min():.0%} to {found.max():.0%}); "
        f"moved of those listed: {total[:, 2].sum() / total[:, 1].sum():.1%}; of the first 100: {total[:, 3].mean():.1%}; "
        f"looking like somebody else and named rightly: {total[:, 4].mean():.1%}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])

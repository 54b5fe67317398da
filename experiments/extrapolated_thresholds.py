"""How many strangers come at thresholds that are extrapolated?  (A minute on 2 cores.)

    python -m experiments.extrapolated_thresholds [lfw.npz]      # of launch.py embed dlib lfw --out lfw.npz

Thresholds are set on a few hundred people, everybody searching among all others, and judged on thousands of others:
drawn
at random on a sphere, and where embeddings are given, real ones. The rates are so rare that less than five of the
searches
that set a threshold are expected at it. Printed is the rate realised over the rate asked for, mean and median over
draws: at
the threshold of the one fitted tail, and at the one that nine in ten resampled tails accept, which is what policies
hold.

What to expect: on photographs, with five strangers expected the fitted tail lets in 1.5 times as many as asked for and
the
cautious threshold 1.15 times; with one, 2.5 and 2 times. Policies have no threshold where fewer than three are
expected.
"""

import argparse
from pathlib import Path

import numpy as np

from faceembed import report
from faceembed.identification import openset, policy, tails

SETTINGS = ((200, 50, 0.001), (200, 50, 0.003), (400, 100, 0.001), (400, 100, 0.003), (400, 100, 0.008))
"""People who set a threshold, people enrolled, FPIR asked for."""


def ratios(people: np.ndarray, set_by: int, k: int, target: float, draws: int) -> dict[str, object]:
    """A row: rates realised by people who did not set the threshold, over the target."""
    rng = np.random.default_rng(0)
    expected = 0.0
    found: dict[str, list[float]] = {"one tail": [], "nine in ten": []}
    for seed in range(draws):
        mixed = rng.permutation(len(people))[: set_by + 3000]
        mine, pool, strangers = np.split(people[mixed], [set_by, set_by + 1500])
        best = openset.ranked(policy.everybody(mine, np.arange(set_by))).from_size(k)
        expected = target * best.searches(k)
        scores = -policy.squared_distances(strangers, pool)
        others = openset.NonMated(scores=scores, who=np.arange(len(scores)), pool=np.arange(len(pool)) + len(scores))
        cuts = {
            "one tail": tails.fit(best, k).threshold(target),
            "nine in ten": tails.cautious_threshold(tails.resampled(best, k, seed=seed), target),
        }
        for name, cut in cuts.items():
            found[name].append(openset.fpir(others, k, cut).value / target)
    row: dict[str, object] = {"set by": set_by, "enrolled": k, "FPIR": target, "expected": round(expected, 2)}
    return row | {name: f"{np.mean(r):.2f} (median {np.median(r):.2f})" for name, r in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("embeddings", type=Path, nargs="?", help="an .npz of launch.py embed, of thousands of people")
    parser.add_argument("--draws", type=int, default=40)
    options = parser.parse_args()
    x = np.random.default_rng(1).normal(size=(6000, 32))
    sets = {"drawn": x / np.linalg.norm(x, axis=1, keepdims=True)}
    if options.embeddings:
        with np.load(options.embeddings, allow_pickle=False) as file:
            sets["given"] = file["embedding"][np.unique(file["identity"], return_index=True)[1]].astype(np.float64)
    rows = [
        {"people": name, **ratios(people, *setting, options.draws)}
        for name, people in sets.items()
        for setting in SETTINGS
    ]
    print(report.table(rows))


if __name__ == "__main__":
    main()

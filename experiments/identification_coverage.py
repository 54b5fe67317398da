"""Do 95 % intervals of identification rates hold the truth 95 times in 100?  (A minute on 2 cores.)

Scores are drawn, so that the truth is known: a stranger's own level (wolves are taken for many), an enrolled person's
(lambs have many taken for them), and noise. Each draw has its own strangers, its own people enrolled and its own noise. How
often an interval holds the rate of the population is counted for

- FPIR and TPIR with 95 % intervals over both, as `identification.openset` gives them;
- the same taken over those who search alone (Wilson), as if the people enrolled did not matter.

What to expect: ours hold 94 to 100 %; those over searchers alone hold 45 % where there are many strangers, or strong lambs.

    python -m experiments.identification_coverage [--replications 1000] [--json FILE]
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtr

from faceembed import metrics, report
from faceembed.identification import openset
from faceembed.identification.openset import Mated, NonMated, Rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Population:
    """Standard deviations of what a stranger and an enrolled person bring, and how many there are."""

    wolf: float
    lamb: float
    strangers: int
    pool: int
    own: float = 3.0
    """By how much a mate's score is higher."""

    def non_mated(self, rng: np.random.Generator) -> NonMated:
        scores = (
            self.wolf * rng.normal(size=(self.strangers, 1))
            + self.lamb * rng.normal(size=(1, self.pool))
            + rng.normal(size=(self.strangers, self.pool))
        )
        return NonMated(scores=scores, who=np.arange(self.strangers) + self.pool, pool=np.arange(self.pool))

    def mated(self, rng: np.random.Generator) -> Mated:
        scores = (
            self.wolf * rng.normal(size=(self.pool, 1))
            + self.lamb * rng.normal(size=(1, self.pool))
            + rng.normal(size=(self.pool, self.pool))
        )
        mate = np.arange(self.pool)
        scores[mate, mate] += self.own
        return Mated(scores=scores, mate=mate, pool=np.arange(self.pool))

    def fpir(self, k: int, threshold: float) -> float:
        """Of all strangers and all galleries, by a fine sum over the strangers' levels."""
        level = np.linspace(-8, 8, 4001)
        weight = np.exp(-(level**2) / 2)
        p = ndtr((self.wolf * level - threshold) / np.hypot(1, self.lamb))
        return float((weight * (1 - (1 - p) ** k)).sum() / weight.sum())

    def tpir(self, k: int, threshold: float) -> float:
        """Likewise: the searcher's level, and what the mate has of lamb and noise."""
        grid = np.linspace(-7, 7, 401)
        level, mate = np.meshgrid(grid, grid)
        weight = np.exp(-(level**2 + mate**2) / 2)
        own = self.own + np.hypot(1, self.lamb) * mate  # the level is in everybody's score
        ahead = ndtr(-own / np.hypot(1, self.lamb))
        hit = (self.wolf * level + own >= threshold) * (1 - ahead) ** (k - 1)
        return float((weight * hit).sum() / weight.sum())


POPULATIONS = {
    "all alike": Population(wolf=0.0, lamb=0.0, strangers=300, pool=100),
    "wolves and lambs": Population(wolf=0.5, lamb=0.5, strangers=300, pool=100),
    "wolves and lambs, 3,000 strangers": Population(wolf=0.5, lamb=0.5, strangers=3000, pool=100),
    "strong lambs": Population(wolf=0.3, lamb=1.0, strangers=300, pool=100),
    "few people": Population(wolf=0.5, lamb=0.5, strangers=60, pool=30),
}


def threshold_for(population: Population, k: int, target: float) -> float:
    """The threshold of an FPIR, by halving."""
    low, high = -5.0, 15.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if population.fpir(k, middle) > target else (low, middle)
    return (low + high) / 2


def simulate(name: str, population: Population, k: int, target: float, replications: int) -> list[dict[str, Any]]:
    """Two rows a quantity: how often an interval held the truth, and its mean width in points."""
    threshold = threshold_for(population, k, target)
    truth = {"FPIR": target, "TPIR": population.tpir(k, threshold)}
    held = {(quantity, method): 0 for quantity in truth for method in ("over both", "over searchers")}
    width = dict.fromkeys(held, 0.0)
    for replication in range(replications):
        rng = np.random.default_rng((7, replication))
        found: dict[str, tuple[Rate, int]] = {
            "FPIR": (openset.fpir(population.non_mated(rng), k, threshold), population.strangers),
            "TPIR": (openset.tpir(population.mated(rng), k, threshold), population.pool),
        }
        for quantity, (rate, n) in found.items():
            limits = {"over both": (rate.low, rate.high), "over searchers": metrics.wilson(rate.value, n)}
            for method, (low, high) in limits.items():
                held[quantity, method] += low <= truth[quantity] <= high
                width[quantity, method] += high - low
    rows = []
    for (quantity, method), count in held.items():
        share = count / replications
        rows.append({
            "people": name, "enrolled": k, "quantity": quantity, "truth": f"{100 * truth[quantity]:.1f} %",
            "interval": method,
            "coverage": f"{100 * share:.1f} % ± {100 * np.sqrt(share * (1 - share) / replications):.1f}",
            "width, points": f"{100 * width[quantity, method] / replications:.1f}",
        })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replications", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    rows = []
    for name, population in POPULATIONS.items():
        for k, target in ((1, 0.02), (10, 0.05), (population.pool, 0.1)):
            rows += simulate(name, population, k, target, options.replications)
    print(f"nominal coverage 95 %, {options.replications:,} replications\n")
    print(report.table(rows))
    if options.json:
        report.write_json(options.json, rows)
    return rows


if __name__ == "__main__":
    main()

"""Do 95 % intervals hold the truth 95 times in 100 when pairs share people?  (About 4 minutes on 2 cores.)

Scores are drawn, not measured, so that the truth is known to the last digit: a genuine pair has its person's effect, both
photos' effects and noise; an impostor pair has both people's effects, the photos' and noise. Each of `--replications` draws
is given to every method, and how often its interval holds the truth is counted. The pairs are

- those of LFW's View 1 test list, where 1,000 pairs share 963 people here and there (or, where lfw is not prepared, as many
  pairs of people drawn with the same unevenness);
- 500 + 500 pairs of which one person has half of the genuine ones, as one man has 58 % of all genuine pairs of LFW;
- 500 + 500 pairs of 15 people, where variances themselves are uncertain;
- all pairs of 80 people with 4 photos each.

What to expect: taking pairs for independent holds too little wherever people have effects; the dyadic sandwich holds 92 to
97 % on View 1; weights for people (the vertex bootstrap), right for all pairs, are too wide on a sparse list.

    python -m experiments.coverage [--replications 1000] [--seed 7] [--data-dir DIR] [--json FILE]
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import numpy as np

from faceembed import metrics, report, uncertainty
from faceembed.data import pairs as pair_lists
from faceembed.data import sources
from faceembed.verification import compare_all

LEVEL = 0.95
FMR = 0.1
HEADS = 4
"""A reference and three others, for simultaneous intervals."""

SHIFT = 2.6
"""Between the means of genuine and impostor scores."""

PERSON, PHOTO, NOISE, OWN = 0.5, 0.3, 0.8, 0.25
"""Standard deviations: a person's effect, a photo's, a pair's noise, and what is a head's own of each of the three."""

phi = NormalDist().cdf


@dataclasses.dataclass(frozen=True)
class Graph:
    """Pairs by photo and person."""

    photo_a: np.ndarray
    photo_b: np.ndarray
    person_a: np.ndarray
    person_b: np.ndarray

    @property
    def same(self) -> np.ndarray:
        return self.person_a == self.person_b


def view1(data_dir: Path) -> Graph:
    """The pairs of LFW's View 1 test list, or as uneven ones where it is not there."""
    path = data_dir / "lfw" / pair_lists.LFW_LISTS["view1_test"]
    if path.is_file():
        listed = pair_lists.read_lfw_pairs(path)
        keys, photo = np.unique(np.concatenate([listed.key_a, listed.key_b]), return_inverse=True)
        _, person = np.unique([key.partition("/")[0] for key in keys], return_inverse=True)
        a, b = photo[: len(listed)], photo[len(listed) :]
        return Graph(a, b, person[a], person[b])
    rng = np.random.default_rng(0)
    popular = rng.pareto(1.5, 1700) + 1
    return _drawn(rng, popular / popular.sum(), 500)


def dominated() -> Graph:
    """500 genuine pairs, half of them of one person; 500 impostor pairs of people drawn evenly."""
    rng = np.random.default_rng(1)
    share = np.full(800, 0.5 / 799)
    share[0] = 0.5
    return _drawn(rng, share, 500)


def few(people: int = 15) -> Graph:
    """500 + 500 pairs of so few people."""
    return _drawn(np.random.default_rng(2), np.full(people, 1 / people), 500)


def _drawn(rng: np.random.Generator, share: np.ndarray, number: int) -> Graph:
    people = len(share)
    genuine = rng.choice(people, number, p=share)
    one = rng.integers(0, people, number)
    other = (one + rng.integers(1, people, number)) % people
    person_a, person_b = np.concatenate([genuine, one]), np.concatenate([genuine, other])
    photos = 40
    i = rng.integers(0, photos, 2 * number)
    j = (i + rng.integers(1, photos, 2 * number)) % photos
    return Graph(person_a * photos + i, person_b * photos + j, person_a, person_b)


def scores(rng: np.random.Generator, graph: Graph) -> np.ndarray:
    """[HEADS, n] scores of one draw of people, photos and noise."""
    people, photos = graph.person_b.max() + 1, max(graph.photo_a.max(), graph.photo_b.max()) + 1
    people = max(people, graph.person_a.max() + 1)

    def part(scale: float) -> np.ndarray:
        mated, alone, photo = (
            scale * s * rng.normal(size=n) for s, n in ((PERSON, people), (PERSON, people), (PHOTO, photos))
        )
        person = np.where(graph.same, mated[graph.person_a], alone[graph.person_a] + alone[graph.person_b])
        return person + photo[graph.photo_a] + photo[graph.photo_b] + scale * NOISE * rng.normal(size=len(graph.same))

    common = SHIFT * graph.same + part(1.0)
    return np.stack([common + part(OWN) for _ in range(HEADS)])


def spread(genuine: bool) -> float:
    """Standard deviation of a score."""
    people = 1 if genuine else 2
    return float(np.sqrt((1 + OWN**2) * (people * PERSON**2 + 2 * PHOTO**2 + NOISE**2)))


CUT = SHIFT / 2
THRESHOLD = NormalDist(0, spread(False)).inv_cdf(1 - FMR)
TRUTH = {
    "accuracy": (phi((SHIFT - CUT) / spread(True)) + phi(CUT / spread(False))) / 2,
    "difference": 0.0,
    "three differences": 0.0,
    "AUC": phi(SHIFT / np.hypot(spread(True), spread(False))),
    "TAR at FMR 10 %": phi((SHIFT - THRESHOLD) / spread(True)),
}

Limits = tuple[float, float]


def list_methods(graph: Graph) -> dict[tuple[str, str], Callable[[np.ndarray, int], list[Limits]]]:
    """(quantity, method) → intervals of one draw of scores; several where they must hold together."""
    same, people = graph.same, (graph.person_a, graph.person_b)
    index = np.unique(np.concatenate(people), return_inverse=True)[1]
    a, b = index[: len(same)], index[len(same) :]

    def correct(s: np.ndarray) -> np.ndarray:
        return (s >= CUT) == same

    def bootstrap(kind: str) -> Callable[[np.ndarray, int], list[Limits]]:
        def interval(s: np.ndarray, seed: int) -> list[Limits]:
            w = uncertainty.pair_weights(uncertainty.vertex_weights(a.max() + 1, 200, seed, kind), a, b)  # type: ignore[arg-type]
            rates = [w[:, k] @ correct(s[0])[k] / np.maximum(w[:, k].sum(axis=1), 1) for k in (same, ~same)]
            low, high = np.quantile((rates[0] + rates[1]) / 2, [0.025, 0.975])
            return [(low, high)]

        return interval

    def differ(s: np.ndarray, heads: int, who: tuple) -> list[uncertainty.Difference]:
        right = np.stack([correct(row) for row in s[: heads + 1]]).astype(float)
        gap = right[1:] - right[0]
        means = gap.mean(axis=1)
        return uncertainty.differences(gap - means[:, None], means, *who, draws=4000)

    def rate(
        of: Callable[[np.ndarray], tuple[float, np.ndarray]], who: tuple
    ) -> Callable[[np.ndarray, int], list[Limits]]:
        return lambda s, seed: [uncertainty.rate_interval(*of(s[0]), *who)]

    def area(s: np.ndarray) -> tuple[float, np.ndarray]:
        return metrics.auc(s, same), uncertainty.auc_influence(s, same)

    def tar(s: np.ndarray) -> tuple[float, np.ndarray]:
        return metrics.matched_tar(s, same, FMR).tar, uncertainty.matched_tar_influence(s, same, FMR)

    def band(s: np.ndarray, seed: int) -> list[Limits]:
        low, high = uncertainty.roc_band(s[0], same, *people, [FMR], draws=200, seed=seed)
        return [(low[0], high[0])]

    none = (None, None)
    as_limits = lambda i: (i.low, i.high)  # noqa: E731
    return {
        ("accuracy", "independent pairs (Wilson)"): lambda s, _: [
            as_limits(uncertainty.wilson_interval(correct(s[0])))
        ],
        ("accuracy", "dyadic sandwich"): lambda s, _: [as_limits(uncertainty.dyadic_interval(correct(s[0]), *people))],
        ("accuracy", "vertex bootstrap, Poisson"): bootstrap("poisson"),
        ("accuracy", "vertex bootstrap, double or nothing"): bootstrap("double"),
        ("difference", "independent pairs"): lambda s, _: [as_limits(d) for d in differ(s, 1, none)],
        ("difference", "dyadic sandwich"): lambda s, _: [as_limits(d) for d in differ(s, 1, people)],
        ("three differences", "each alone"): lambda s, _: [as_limits(d) for d in differ(s, 3, people)],
        ("three differences", "max-|t|"): lambda s, _: [
            (d.simultaneous_low, d.simultaneous_high) for d in differ(s, 3, people)
        ],
        ("AUC", "independent pairs (DeLong)"): rate(area, none),
        ("AUC", "dyadic sandwich"): rate(area, people),
        ("TAR at FMR 10 %", "independent pairs"): rate(tar, none),
        ("TAR at FMR 10 %", "dyadic sandwich"): rate(tar, people),
        ("TAR at FMR 10 %", "double or nothing (ROC band)"): band,
    }


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """A head whose scores were drawn: photo i is the embedding [i + 1]."""

    table: np.ndarray

    def cross_scores(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return self.table[np.ix_(a[:, 0].astype(int) - 1, b[:, 0].astype(int) - 1)]


def dense_methods(graph: Graph, people: np.ndarray) -> dict[tuple[str, str], Callable[[np.ndarray, int], list[Limits]]]:
    """Of all pairs: TAR at a FMR that those pairs set, and its difference between two heads."""
    emb = np.arange(1.0, len(people) + 1)[:, None]

    def results(s: np.ndarray, seed: int, heads: int) -> object:
        tables = {}
        for head in range(heads):
            table = np.zeros((len(people), len(people)))
            table[graph.photo_a, graph.photo_b] = table[graph.photo_b, graph.photo_a] = s[head]
            tables[str(head)] = _Drawn(table)
        return compare_all(emb, people, tables, fmrs=[FMR], draws=300, seed=seed)

    def tar(s: np.ndarray, seed: int) -> list[Limits]:
        interval = results(s, seed, 1)["0"].tar[FMR].interval  # type: ignore[index]
        return [(interval.low, interval.high)]

    def difference(s: np.ndarray, seed: int) -> list[Limits]:
        [found] = results(s, seed, 2).differences  # type: ignore[attr-defined]
        return [(found.low, found.high)]

    def independent(s: np.ndarray, seed: int) -> list[Limits]:
        same = graph.same
        found = metrics.matched_tar(s[0], same, FMR).tar
        return [metrics.wilson(found, int(same.sum()))]

    return {
        ("TAR at FMR 10 %", "independent pairs (Wilson)"): independent,
        ("TAR at FMR 10 %", "vertex bootstrap, Poisson"): tar,
        ("difference", "vertex bootstrap, Poisson"): difference,
    }


def all_pairs(people: int = 80, photos: int = 4) -> tuple[Graph, np.ndarray]:
    """Every photo against every other."""
    who = np.repeat(np.arange(people), photos)
    a, b = np.triu_indices(len(who), 1)
    return Graph(a, b, who[a], who[b]), who


def simulate(name: str, graph: Graph, methods: dict, replications: int, seed: int) -> list[dict]:
    """A row a method: share of intervals that held the truth, its standard error, mean width in points."""
    held = dict.fromkeys(methods, 0)
    width = dict.fromkeys(methods, 0.0)
    for replication in range(replications):
        s = scores(np.random.default_rng((seed, replication)), graph)
        for key, method in methods.items():
            limits = method(s, replication)
            held[key] += all(low <= TRUTH[key[0]] <= high for low, high in limits)
            width[key] += float(np.mean([high - low for low, high in limits]))
    rows = []
    for (quantity, method), count in held.items():
        share = count / replications
        rows.append(
            {
                "pairs": name,
                "quantity": quantity,
                "interval": method,
                "coverage": f"{100 * share:.1f} % ± {100 * np.sqrt(share * (1 - share) / replications):.1f}",
                "width, points": f"{100 * width[quantity, method] / replications:.2f}",
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> list[dict]:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replications", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--data-dir", type=Path, default=sources.default_data_dir())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    rows = []
    lists = {"View 1 test list": view1(options.data_dir), "one person has half": dominated(), "15 people": few()}
    for name, graph in lists.items():
        rows += simulate(name, graph, list_methods(graph), options.replications, options.seed)
    graph, people = all_pairs()
    rows += simulate(
        "all pairs, 80 × 4", graph, dense_methods(graph, people), max(1, options.replications // 4), options.seed
    )
    print(f"nominal coverage {100 * LEVEL:g} %, {options.replications:,} replications (all pairs: a quarter)\n")
    print(report.table(rows))
    if options.json:
        report.write_json(options.json, rows)
    return rows


if __name__ == "__main__":
    main()

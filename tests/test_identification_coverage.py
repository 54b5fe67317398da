"""The simulation behind the intervals of identification: its truth is true, and intervals over searchers alone show."""

import numpy as np
import pytest

from experiments import identification_coverage as coverage
from faceembed.identification import openset


@pytest.mark.parametrize("name", ["wolves and lambs", "few people"])
def test_the_truth_is_the_mean_over_draws(name):
    population = coverage.POPULATIONS[name]
    k = 10
    threshold = coverage.threshold_for(population, k, 0.05)
    fpir, tpir = [], []
    for i in range(300):
        rng = np.random.default_rng((3, i))
        fpir.append(openset.fpir(population.non_mated(rng), k, threshold).value)
        tpir.append(openset.tpir(population.mated(rng), k, threshold).value)
    for values, truth in ((fpir, 0.05), (tpir, population.tpir(k, threshold))):
        assert np.mean(values) == pytest.approx(truth, abs=4 * np.std(values) / np.sqrt(len(values)))


def test_few_people_who_attract_most_matches_are_allowed_for():
    """Their number is what the variance rests on: with normal quantiles the interval would hold in 87 %."""
    rows = coverage.simulate("", coverage.POPULATIONS["strong lambs"], 100, 0.1, 400)
    share = {row["interval"]: float(row["coverage"].split(" %")[0]) for row in rows if row["quantity"] == "FPIR"}
    assert share["over both"] >= 93


def test_people_enrolled_matter():
    population = coverage.POPULATIONS["wolves and lambs, 3,000 strangers"]
    rows = coverage.simulate("", population, 100, 0.1, 40)
    share = {row["interval"]: float(row["coverage"].split(" %")[0]) for row in rows if row["quantity"] == "FPIR"}
    assert share["over both"] >= 82.5
    assert share["over searchers"] <= 70

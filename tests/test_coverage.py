"""The simulation behind the coverage table: its truth is true, and a wrong interval shows."""

import numpy as np
import pytest

from experiments import coverage
from faceembed import metrics


@pytest.fixture(scope="module")
def drawn():
    graph = coverage.dominated()
    return graph, [coverage.scores(np.random.default_rng((1, i)), graph) for i in range(400)]


def test_the_truth_is_the_mean_over_draws(drawn):
    graph, draws = drawn
    # The one person with half of the pairs makes single draws stray; their mean must not.
    figures = {
        "accuracy": [((s[0] >= coverage.CUT) == graph.same).mean() for s in draws],
        "difference": [((s[1] >= coverage.CUT) == graph.same).mean() - ((s[0] >= coverage.CUT) == graph.same).mean()
                       for s in draws],
        "AUC": [metrics.auc(s[0], graph.same) for s in draws],
        "TAR at FMR 10 %": [metrics.matched_tar(s[0], graph.same, coverage.FMR).tar for s in draws],
    }  # fmt: skip
    for name, values in figures.items():
        error = np.std(values) / np.sqrt(len(values))
        # A finite list's TAR at a matched FMR is biased by half a per cent or so: the threshold is an order statistic.
        slack = 0.006 if name.startswith("TAR") else 0.0
        assert abs(np.mean(values) - coverage.TRUTH[name]) < 4 * error + slack, name


def test_pairs_of_one_person_are_alike_and_scores_have_the_spread_that_the_truth_takes(drawn):
    graph, draws = drawn
    first = np.stack([s[0] for s in draws])
    for kind in (True, False):
        assert first[:, graph.same == kind].std() == pytest.approx(coverage.spread(kind), rel=0.03)
    his = np.flatnonzero(graph.same & (graph.person_a == 0))
    assert len(his) > 200
    together = np.corrcoef(first[:, his[0]], first[:, his[1]])[0, 1]
    assert together > 0.1
    assert (graph.photo_a != graph.photo_b).all()
    assert (graph.photo_a // 40 == graph.person_a).all()


def test_the_table_has_a_row_a_method_and_tells_a_wrong_one(tmp_path, capsys):
    rows = coverage.main(["--replications", "20", "--data-dir", str(tmp_path), "--json", str(tmp_path / "rows.json")])
    assert (tmp_path / "rows.json").is_file()
    named = {(row["pairs"], row["quantity"], row["interval"]): float(row["coverage"].split()[0]) for row in rows}
    assert len(named) == 42
    assert named["one person has half", "AUC", "independent pairs (DeLong)"] < 80
    assert named["one person has half", "AUC", "dyadic sandwich"] >= 80
    assert "nominal coverage 95 %" in capsys.readouterr().out

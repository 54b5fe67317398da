"""All pairs: counts, order statistics and draws of people against nested loops over every pair."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faceembed import metrics, uncertainty
from faceembed.verification import Head, compare_all, dense
from faceembed.verification.features import FEATURES


class Nearness:
    """Minus the squared distance; exact, and full of ties, on embeddings of small integers."""

    def cross_scores(self, a, b):
        return -np.square(np.asarray(a, np.float64)[:, None] - np.asarray(b, np.float64)[None]).sum(axis=2)


class Taxi:
    """Minus the city-block distance: another order of the same pairs."""

    def cross_scores(self, a, b):
        return -np.abs(np.asarray(a, np.float64)[:, None] - np.asarray(b, np.float64)[None]).sum(axis=2)


HEADS = {"threshold": Nearness(), "taxi": Taxi()}


def photos(seed, n=24, people=9):
    """Integer embeddings, copies among them, of people some of whom have one image; person 0 has two at least."""
    rng = np.random.default_rng(seed)
    emb = rng.integers(-2, 3, (n, 3)).astype(np.float64)
    emb[~emb.any(axis=1)] = 1
    who = rng.integers(0, people, n)
    who[:4] = [0, 1, 0, 2]
    return emb, np.array([f"p{w}" for w in who])


def unit(seed, n=150, people=60, d=16):
    """(unit vectors that cluster by person, person ids in random order)."""
    rng = np.random.default_rng(seed)
    who = np.concatenate([np.arange(people), rng.integers(0, 8, n - people)])
    rng.shuffle(who)
    emb = rng.normal(size=(people, d))[who] + 0.8 * rng.normal(size=(n, d))
    return emb / np.linalg.norm(emb, axis=1, keepdims=True), who


def every_pair(emb, who, head):
    """[(i, j, score)] by a nested loop."""
    n = len(who)
    return [
        (i, j, float(head.cross_scores(emb[i : i + 1], emb[j : j + 1])[0, 0]))
        for i in range(n)
        for j in range(i + 1, n)
    ]


def as_list(pairs, who):
    return np.array([s for *_, s in pairs]), np.array([who[i] == who[j] for i, j, _ in pairs])


def weighted(pairs, who, weight, fmr=None, threshold=None):
    """(person-weighted TAR, pair-weighted TAR, FMR, threshold), by repeating every pair as often as it weighs."""
    scores, same = [], []
    for i, j, score in pairs:
        times = weight[who[i]] if who[i] == who[j] else weight[who[i]] * weight[who[j]]
        scores += [score] * int(times)
        same += [who[i] == who[j]] * int(times)
    if threshold is None:
        threshold = metrics.threshold_at_far(scores, same, fmr)
    by_pair, realised = metrics.rates_at(scores, same, threshold)
    shares = []
    for person in sorted(set(who)):
        own = [score >= threshold for i, j, score in pairs if who[i] == who[j] == person]
        if own:
            shares += [np.mean(own)] * int(weight[person])
    return float(np.mean(shares)), by_pair, realised, threshold


# ---- figures


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31 - 1), tile=st.sampled_from([3, 8, 1024]))
def test_every_figure_equals_that_of_the_list_of_all_pairs(seed, tile):
    emb, who = photos(seed)
    results = compare_all(emb, who, HEADS, fmrs=(0.3, 0.1, 0.02), draws=40, tile=tile)
    once = dict.fromkeys(who, 1)
    for name, head in HEADS.items():
        pairs = every_pair(emb, who, head)
        scores, same = as_list(pairs, who)
        assert (results.n_genuine, results.n_impostor) == (same.sum(), (~same).sum())
        assert results[name].auc == pytest.approx(metrics.auc(scores, same), abs=1e-14)
        assert results[name].eer == pytest.approx(metrics.eer(scores, same), abs=1e-14)
        for fmr, point in results[name].tar.items():
            tar, by_pair, realised, threshold = weighted(pairs, who, once, fmr)
            assert point.threshold == threshold
            assert (point.tar, point.tar_pairs, point.realised) == pytest.approx((tar, by_pair, realised), abs=1e-14)
            assert point.false_matches == round(realised * results.n_impostor)


def test_people_count_equally_and_pairs_beside_them_in_a_case_by_hand():
    # ann has three pairs, one at 0 and two at -4; bob one at -1; impostor pairs begin at -9, and then two tie at -13.
    emb = np.array([[0.0, 9], [0, 9], [2, 9], [7, 9], [7, 8], [2, 6]])
    who = ["ann", "ann", "ann", "bob", "bob", "cid"]
    results = compare_all(emb, who, {"near": Nearness()}, fmrs=(0.2,), draws=40)
    assert (results.n_people, results.n_genuine_people, results.n_genuine, results.n_impostor) == (3, 2, 4, 11)
    assert results.effective_people == pytest.approx((3 + 1) ** 2 / (9 + 1))
    point = results["near"].tar[0.2]
    # 2 of 11 impostor pairs may pass: -9 does, and of the two that tie at -13 only both could.
    assert point.threshold == np.nextafter(-13.0, np.inf)
    assert (point.false_matches, point.realised) == (1, 1 / 11)
    assert (point.tar, point.tar_pairs) == (1.0, 1.0)
    strict = compare_all(emb, who, {"near": Nearness()}, fmrs=(0.05,), thresholds={"near": {0.01: -1.0}}, draws=40)
    assert strict["near"].tar[0.05].threshold == np.nextafter(-9.0, np.inf)
    moved = strict["near"].transferred[0.01]
    assert (moved.fnmr, moved.fnmr_pairs, moved.fmr) == (pytest.approx((2 / 3 + 0) / 2), 0.5, 0.0)
    assert strict["near"].false_matches[0] == (2, 5, -9.0)
    assert strict["near"].false_non_matches == ((0, 2, -4.0), (1, 2, -4.0), (3, 4, -1.0), (0, 1, 0.0))


def test_ids_may_be_numbers_and_float32_embeddings_give_the_same():
    emb, who = photos(3)
    number = np.array([int(w[1:]) for w in who])
    one, other = (compare_all(e, w, HEADS, draws=40).to_dict() for e, w in ((emb, who), (emb.astype("f4"), number)))
    for result in one["heads"].values():
        for person in (
            itertools.chain(*(result["concentration"][k] for k in ("lambs_and_wolves", "goats")))
            if result["concentration"]
            else ()
        ):
            person["person"] = int(person["person"][1:])
    assert one == other


@pytest.mark.parametrize("feature", ["squared_distance", "abs_difference", "cosine"])
def test_a_fitted_head_is_tiled_to_the_same_as_pair_by_pair(feature):
    emb, who = unit(1)
    size = FEATURES[feature](emb[:1], emb[:1]).shape[1]
    weight = tuple((-1.0 if feature != "cosine" else 1.0) * np.linspace(1, 2, size))
    head = Head(
        name="h", feature=feature, weight=weight, intercept=0.7, threshold=0.0, calibrated=True, dim=emb.shape[1]
    )
    i, j = np.triu_indices(len(who), 1)
    scores, same = head.score(emb[i], emb[j]), who[i] == who[j]
    result = compare_all(emb, who, {"h": head}, fmrs=(0.05, 0.002), draws=40, tile=37)["h"]
    assert result.auc == pytest.approx(metrics.auc(scores, same), abs=1e-12)
    assert result.eer == pytest.approx(metrics.eer(scores, same), abs=1e-12)
    for fmr, point in result.tar.items():
        assert point.threshold == pytest.approx(metrics.threshold_at_far(scores, same, fmr), rel=1e-6)
        assert point.tar_pairs == metrics.rates_at(scores, same, point.threshold)[0]


# ---- invariance


@pytest.mark.parametrize("tile", [7, 64, 149])
def test_the_tile_changes_nothing(tile, monkeypatch):
    emb, who = unit(2)
    heads = {"threshold": distance(emb.shape[1]), "taxi": Taxi()}
    asked = {"fmrs": (0.02, 0.002), "draws": 60, "thresholds": {"taxi": {0.01: -2.0}}}
    whole = compare_all(emb, who, heads, **asked)
    kept = []
    original = dense._highest
    monkeypatch.setattr(dense, "_highest", lambda *args: kept.append(1) or original(*args))
    assert compare_all(emb, who, heads, tile=tile, **asked).to_dict() == whole.to_dict()
    assert len(kept) > 2 or tile != 7  # what is kept was cut down on the way, not only at the end


def test_the_order_of_images_changes_only_the_rows_that_are_named():
    emb, who = unit(3)
    order = np.random.default_rng(0).permutation(len(who))
    heads = {"threshold": distance(emb.shape[1]), "taxi": Taxi()}
    one = compare_all(emb, who, heads, draws=60).to_dict()
    other = compare_all(emb[order], who[order], heads, draws=60).to_dict()
    for name in heads:
        for key in ("false_matches", "false_non_matches"):
            here, there = one["heads"][name].pop(key), other["heads"][name].pop(key)
            back = [
                {"i": min(order[[p["i"], p["j"]]]), "j": max(order[[p["i"], p["j"]]]), "score": p["score"]}
                for p in there
            ]
            # Ties go by row, and rows are what changed; the last score may tie with pairs that are left out.
            named = [
                {(p["score"], p["i"], p["j"]) for p in side if p["score"] != here[-1]["score"]} for side in (back, here)
            ]
            assert named[0] == named[1]
            assert [p["score"] for p in back] == [p["score"] for p in here]
    assert one == other


def distance(d):
    return Head(
        name="threshold",
        feature="squared_distance",
        weight=(-1.0,),
        intercept=0.0,
        threshold=-1.0,
        calibrated=False,
        dim=d,
    )


class Rounding(Nearness):
    """As a matrix product does it: ||a||² + ||b||² - 2ab leaves noise of the last bits, another in another tile."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def cross_scores(self, a, b):
        exact = super().cross_scores(a, b)
        return exact + self.rng.uniform(-4e-15, 4e-15, exact.shape)


def test_copies_tie_though_matrix_products_round():
    one = np.random.default_rng(0).normal(size=(5, 64))
    emb = np.repeat(one / np.linalg.norm(one, axis=1, keepdims=True), 8, axis=0)
    who = np.arange(40) % 4  # each photo is of four people, twice of each
    i, j = np.triu_indices(40, 1)
    scores, same = -np.square(emb[i] - emb[j]).sum(axis=1).astype(np.float32), who[i] == who[j]
    result = compare_all(emb, who, {"rounding": Rounding()}, fmrs=(0.1,), draws=40, tile=11)["rounding"]
    assert result.auc == metrics.auc(scores, same)
    assert {pair.score for pair in result.false_matches} == {0.0}
    # A fifth of the impostor pairs are copies and tie at 0: at 10 % they must all be refused, and genuine copies too.
    assert (result.tar[0.1].threshold, result.tar[0.1].tar) == (np.nextafter(0.0, 1.0), 0.0)


def test_copies_tie_though_nothing_else_shows_the_scale():
    emb = np.repeat(np.eye(3), 2, axis=0)
    result = compare_all(emb, [0, 0, 1, 1, 2, 2], {"rounding": Rounding()}, fmrs=(0.1,), draws=40)["rounding"]
    assert {pair.score for pair in result.false_non_matches} == {0.0}


# ---- draws of people


@pytest.mark.parametrize("block", [4, 512])
@pytest.mark.parametrize("seed", range(3))
def test_draws_equal_lists_in_which_pairs_are_repeated(block, seed, monkeypatch):
    monkeypatch.setattr(dense, "BLOCK", block)
    emb, who = photos(seed, n=20, people=7)
    names = sorted(set(who))
    rng = np.random.default_rng(seed)
    poisson = rng.poisson(1.0, (40, len(names))).astype(np.uint8)
    poisson[0] = 1
    poisson[1, :3] = [20, 17, 0]  # 20 · 17 is more than a uint8 holds
    poisson[2] = 0  # nobody: no draw
    double = 2 * rng.integers(0, 2, (40, len(names))).astype(np.uint8)
    monkeypatch.setattr(
        uncertainty, "vertex_weights", lambda m, n, s, kind: {"poisson": poisson, "double": double}[kind]
    )

    cut = {"taxi": {0.2: -3.0}, "threshold": {0.1: -2.5}}
    results = compare_all(emb, who, HEADS, fmrs=(0.3, 0.05), draws=40, thresholds=cut)
    listed = {name: every_pair(emb, who, head) for name, head in HEADS.items()}
    _, same = as_list(listed["taxi"], who)

    def usable(weights):
        kept = []
        for row in weights.astype(int):
            w = dict(zip(names, row, strict=True))
            genuine = sum(w[who[i]] for i, j, _ in listed["taxi"] if who[i] == who[j])
            impostor = sum(w[who[i]] * w[who[j]] for i, j, _ in listed["taxi"] if who[i] != who[j])
            if genuine and impostor:
                kept.append(w)
        return kept

    drawn, bands = usable(poisson), usable(double)
    assert results.draws == len(drawn) < 40
    tars = {}
    for name, pairs in listed.items():
        for fmr, point in results[name].tar.items():
            tar, by_pair, _, thresholds = np.array([weighted(pairs, who, w, fmr) for w in drawn]).T
            tars[name, fmr] = tar
            assert (point.interval.low, point.interval.high) == pytest.approx(tuple(np.quantile(tar, [0.025, 0.975])))
            assert (point.interval_pairs.low, point.interval_pairs.high) == pytest.approx(
                tuple(np.quantile(by_pair, [0.025, 0.975]))
            )
            assert (point.threshold_low, point.threshold_high) == pytest.approx(
                tuple(np.quantile(thresholds, [0.025, 0.975])), rel=1e-6
            )
            p = point.tar
            assert point.interval.n_effective == pytest.approx(min(same.sum(), p * (1 - p) / tar.var(ddof=1)))
        [(target, threshold)] = cut[name].items()
        moved = results[name].transferred[target]
        at = np.array([weighted(pairs, who, w, threshold=threshold) for w in drawn])
        whole = weighted(pairs, who, dict.fromkeys(names, 1), threshold=threshold)
        assert (1 - moved.fnmr, 1 - moved.fnmr_pairs, moved.fmr) == pytest.approx(whole[:3])
        for interval, column, sign in (
            (moved.fnmr_interval, at[:, 0], -1),
            (moved.fnmr_pairs_interval, at[:, 1], -1),
            (moved.fmr_interval, at[:, 2], 1),
        ):
            rate = column if sign == 1 else 1 - column
            assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(rate, [0.025, 0.975])), abs=1e-12)
        band = results[name].band
        for k in (0, 11, len(band.fmr) - 1):
            tar = [weighted(pairs, who, w, float(band.fmr[k]))[0] for w in bands]
            assert (band.low[k], band.high[k]) == pytest.approx(tuple(np.quantile(tar, [0.025, 0.975])))
            assert band.tar[k] == pytest.approx(weighted(pairs, who, dict.fromkeys(names, 1), float(band.fmr[k]))[0])

    for d in results.differences:
        assert (d.head, d.reference) == ("taxi", "threshold")
        delta = tars["taxi", d.fmr] - tars["threshold", d.fmr]
        point = results["taxi"].tar[d.fmr].tar - results["threshold"].tar[d.fmr].tar
        error = delta.std(ddof=1)
        critical = np.quantile(np.abs(delta - point), 0.95)
        assert d.difference == pytest.approx(point)
        assert (d.low, d.high) == pytest.approx(tuple(np.quantile(delta, [0.025, 0.975])))
        assert (d.simultaneous_low, d.simultaneous_high) == pytest.approx((point - critical, point + critical))
        assert d.detectable == pytest.approx((1.959964 + 0.841621) * error, rel=1e-5)


def test_limits_for_all_heads_together_are_those_of_the_one_that_strays_farthest():
    emb, who = unit(5)
    rng = np.random.default_rng(0)

    def noisy(k):
        matrix = rng.normal(size=(emb.shape[1], k))
        return Projected(matrix)

    heads = {"threshold": Nearness(), "same": Nearness(), **{f"p{k}": noisy(k) for k in (4, 6, 8)}}
    results = compare_all(emb, who, heads, fmrs=(0.05,), draws=200)
    alone = compare_all(emb, who, {k: heads[k] for k in ("threshold", "p4")}, fmrs=(0.05,), draws=200)
    family = {d.head: d for d in results.differences}
    [single] = alone.differences
    width = family["p4"].simultaneous_high - family["p4"].difference
    assert width > 1.1 * (single.simultaneous_high - single.difference)
    assert family["p4"].low == single.low  # on shared draws, whatever else is compared
    factors = {(d.simultaneous_high - d.difference) / d.standard_error for d in family.values() if d.head != "same"}
    assert max(factors) == pytest.approx(min(factors))
    same, limit = family["same"], 3 / results.n_genuine_people  # as for a rate of which no event was seen
    assert (same.difference, same.standard_error) == (0, 0)
    assert (same.low, same.high) == (same.simultaneous_low, same.simultaneous_high) == (-limit, limit)
    assert same.detectable == limit


class Projected:
    def __init__(self, matrix):
        self.matrix = matrix

    def cross_scores(self, a, b):
        return Nearness().cross_scores(a @ self.matrix, b @ self.matrix)


def test_a_draw_that_needs_more_impostor_pairs_than_were_kept_gets_them(monkeypatch):
    emb, who = unit(4)
    who[:30] = 0  # one person is half of what impostor pairs weigh
    plenty = compare_all(emb, who, HEADS, fmrs=(0.01,), draws=80)
    passes = []
    original = dense._impostor
    monkeypatch.setattr(dense, "_impostor", lambda *args: passes.append(args[-1]) or original(*args))
    monkeypatch.setattr(dense, "SLACK", 1.0)
    assert compare_all(emb, who, HEADS, fmrs=(0.01,), draws=80).to_dict() == plenty.to_dict()
    assert passes[:2] == [1.0, 2.0]
    assert len(passes) == len(set(passes[:-1])) + 1  # the second head starts with what the first one needed


def test_seeds_differ_and_repeat():
    emb, who = unit(6)
    runs = [compare_all(emb, who, HEADS, fmrs=(0.05,), draws=60, seed=seed).to_dict() for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    intervals = [run["heads"]["taxi"]["tar"][0]["interval"]["low"] for run in runs]
    assert intervals[0] != intervals[2]


def test_an_interval_without_errors_rests_on_people():
    emb = np.repeat(np.eye(6), 3, axis=0)
    point = compare_all(emb, np.repeat(np.arange(6), 3), {"near": Nearness()}, fmrs=(0.1,), draws=40)["near"].tar[0.1]
    assert (point.tar, point.realised) == (1.0, 0.0)
    assert (point.interval.low, point.interval.high) == metrics.wilson(1.0, 6)


@given(rate=st.floats(1e-6, 1, exclude_max=True), n=st.integers(1, 300))
def test_what_a_rate_allows_is_the_largest_count_whose_share_is_not_above_it(rate, n):
    for r in (rate, round(rate, 2)):
        if 0 < r < 1:
            assert dense._allowed(r, np.array([n]))[0] == max(k for k in range(n + 1) if k / n <= r)


def test_a_rate_that_rounds_allows_as_many_as_in_a_list():
    assert dense._allowed(0.29, np.array([100]))[0] == 29  # 0.29 · 100 is 28.999999999999996
    assert dense._allowed(0.07, np.array([100]))[0] == 7  # 0.07 · 100 is 7.000000000000001
    assert dense._allowed(np.nextafter(0.9, 0), np.array([10]))[0] == 8  # ten times that number is 9.0


# ---- curves and people


def test_the_curve_consists_of_points_of_the_whole_roc():
    emb, who = unit(7)
    pairs = every_pair(emb, who, Taxi())
    scores, same = as_list([(i, j, float(np.float32(s))) for i, j, s in pairs], who)
    curve = compare_all(emb, who, {"taxi": Taxi()}, draws=40)["taxi"].curve
    assert (curve.fmr[0], curve.tar[0], curve.tar_pairs[0], curve.threshold[0]) == (0, 0, 0, np.inf)
    assert (curve.fmr[-1], curve.tar[-1], curve.tar_pairs[-1], curve.threshold[-1]) == (1, 1, 1, -np.inf)
    assert 50 < len(curve.fmr) <= 2 * dense.CURVE_POINTS + 2
    genuine = [(s, int(who[i])) for s, (i, j, _) in zip(scores, pairs, strict=True) if who[i] == who[j]]
    for fmr, tar, by_pair, threshold in zip(curve.fmr, curve.tar, curve.tar_pairs, curve.threshold, strict=True):
        assert (by_pair, fmr) == pytest.approx(metrics.rates_at(scores, same, threshold), abs=1e-12)
        accepted = {}
        for score, person in genuine:
            accepted.setdefault(person, []).append(score >= threshold)
        assert tar == pytest.approx(np.mean([np.mean(own) for own in accepted.values()]), abs=1e-12)


def test_errors_are_counted_for_both_people_of_a_false_match():
    emb, who = unit(8)
    result = compare_all(emb, who, {"taxi": Taxi()}, fmrs=(0.02, 0.004, 1e-5), draws=40)["taxi"]
    c = result.concentration
    assert c.fmr == 0.004  # 1e-5 is not resolvable with 10,000 pairs
    threshold = result.tar[0.004].threshold
    false, own = dict.fromkeys(range(60), 0), {}
    for i, j, score in every_pair(emb, who, Taxi()):
        if who[i] == who[j]:
            own.setdefault(int(who[i]), []).append(float(np.float32(score)) < threshold)
        elif float(np.float32(score)) >= threshold:
            false[int(who[i])] += 1
            false[int(who[j])] += 1
    most = sorted(false.values(), reverse=True)
    assert c.top_1 == pytest.approx(most[0] / sum(most))  # 1 % of 60 people is one of them
    assert c.top_10 == pytest.approx(sum(most[:6]) / sum(most))
    assert sum(most) == 2 * result.tar[0.004].false_matches
    photos = np.bincount(who)
    for person in c.lambs_and_wolves:
        compared = int(photos[person.person] * (len(who) - photos[person.person]))
        assert (person.errors, person.comparisons) == (false[person.person], compared)
    assert [person.errors for person in c.lambs_and_wolves] == [m for m in most[: dense.WORST] if m]
    for person in c.goats:
        assert (person.errors, person.comparisons) == (sum(own[person.person]), len(own[person.person]))
    rates = sorted((np.mean(refused) for refused in own.values()), reverse=True)
    assert [person.rate for person in c.goats] == pytest.approx([r for r in rates[: dense.WORST] if r])
    exposed = sum(photos[p.person] * (len(who) - photos[p.person]) for p in c.lambs_and_wolves[:1])
    assert c.exposure_1 == pytest.approx(exposed / sum(photos * (len(who) - photos)))


@pytest.mark.parametrize("seed", range(3))
def test_the_worst_pairs_are_the_first_of_all_and_ties_go_by_row(seed):
    emb, who = photos(seed, n=40)
    result = compare_all(emb, who, {"near": Nearness()}, draws=40, tile=9)["near"]
    pairs = every_pair(emb, who, Nearness())
    impostor = sorted((-s, i, j) for i, j, s in pairs if who[i] != who[j])
    genuine = sorted((s, i, j) for i, j, s in pairs if who[i] == who[j])
    assert result.false_matches == tuple((i, j, -s) for s, i, j in impostor[: dense.PAIRS])
    assert result.false_non_matches == tuple((i, j, s) for s, i, j in genuine[: dense.PAIRS])


# ---- thresholds from elsewhere, layers, output


@pytest.mark.parametrize("tile", [10, 1024])
def test_a_lenient_threshold_from_elsewhere_has_all_that_it_accepts_counted(tile):
    emb, who = unit(9)
    pairs = every_pair(emb, who, Taxi())
    scores, same = as_list(pairs, who)
    threshold = float(np.quantile(scores[~same], 0.2))  # accepts 80 % of the impostor pairs
    results = compare_all(
        emb, who, {"taxi": Taxi()}, fmrs=(0.01,), thresholds={"taxi": {0.01: threshold}}, draws=40, tile=tile
    )
    moved = results["taxi"].transferred[0.01]
    assert moved.fmr == pytest.approx(0.8, abs=1e-3)
    assert moved.fmr_interval.low < moved.fmr < moved.fmr_interval.high


@pytest.mark.parametrize("step", [-1, 0, 1])
def test_a_threshold_between_two_float32_numbers_decides_alike_everywhere(step):
    emb = np.array([[0, 1], [0, 1.5], [0, 4], [0, 4.25], [0, 7], [0, 7.125]])  # the first pair scores -0.25
    threshold = float(np.nextafter(-0.25, step) if step else -0.25)
    moved = compare_all(
        emb, [0, 0, 1, 1, 2, 2], {"near": Nearness()}, fmrs=(0.3,), thresholds={"near": {0.1: threshold}}, draws=60
    )["near"].transferred[0.1]
    assert (moved.fnmr, moved.fnmr_pairs) == pytest.approx((1 / 3, 1 / 3) if threshold > -0.25 else (0, 0))
    for interval in (moved.fnmr_interval, moved.fnmr_pairs_interval):
        if threshold > -0.25:
            assert interval.low < 1 / 3 < interval.high < 1 + 1e-9
        else:
            assert (interval.low, interval.high) == metrics.wilson(0.0, 3)


def test_heads_of_layers_read_their_layer():
    emb, who = unit(10)
    other = unit(11)[0]

    class OfLayer(Nearness):
        layer = "flat"

    heads = {"threshold": Nearness(), "threshold@flat": OfLayer()}
    results = compare_all(emb, who, heads, draws=40, layers={"flat": other})
    alone = compare_all(other, who, {"threshold": Nearness()}, draws=40)
    assert results["threshold@flat"].tar == alone["threshold"].tar
    with pytest.raises(ValueError, match="head threshold@flat reads layer 'flat', and the layers given are: none"):
        compare_all(emb, who, heads, draws=40)


def test_the_table_says_what_cannot_be_resolved_and_what_is_excluded():
    emb, who = unit(12)
    results = compare_all(
        emb, who, HEADS, fmrs=(0.01, 0.0015, 1e-4), thresholds={"taxi": {0.01: -2.0}}, reference="taxi", draws=60
    )
    text = str(results)
    assert f"{results.n_genuine:,} genuine and {results.n_impostor:,} impostor pairs" in text
    assert f"{results.effective_people:,.1f} (effective number of people)" in text
    assert text.count("not resolvable (needs 300,000)") == 4
    point = results["taxi"].tar[0.0015]
    assert f"~{100 * point.tar:.2f} % [{100 * point.interval.low:.2f}, {100 * point.interval.high:.2f}]" in text
    assert "~ rests on fewer than 30" in text
    assert "threshold minus taxi: " in text
    assert "at FMR 0.01 %" not in text
    assert "thresholds set elsewhere" in text
    assert "take part in" in text
    with pytest.raises(KeyError, match="no head 'abs' was compared; these were: threshold, taxi"):
        results["abs"]


def test_json_holds_everything():
    emb, who = unit(13)
    results = compare_all(emb, who, HEADS, fmrs=(0.01,), thresholds={"taxi": {0.01: -2.0}}, draws=60)
    told = json.loads(json.dumps(results.to_dict(), allow_nan=False))
    assert list(told["heads"]) == list(results) == ["threshold", "taxi"]
    taxi = told["heads"]["taxi"]
    assert taxi["tar"][0]["tar"] == results["taxi"].tar[0.01].tar
    assert taxi["tar"][0]["resolution"]["status"] == results["taxi"].tar[0.01].resolution.status
    assert taxi["transferred"][0]["fmr"] == results["taxi"].transferred[0.01].fmr
    assert taxi["false_matches"][0] == results["taxi"].false_matches[0]._asdict()
    assert told["differences"][0]["head"] == "taxi"


# ---- what is refused


def broken(value, where=(3, 1)):
    emb, _ = photos(0)
    emb[where] = value
    return emb


EMB, WHO = photos(0)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((broken(np.nan), WHO, HEADS), {}, r"1 rows of emb are not finite, first at \[3\]"),
        ((broken(0, where=5), WHO, HEADS), {}, r"1 rows of emb are all zero, first at \[5\]"),
        ((EMB, WHO, HEADS), {"layers": {"flat": broken(np.inf)}}, "rows of layer flat are not finite"),
        ((EMB[:-1], WHO, HEADS), {}, "emb has 23 rows for 24 people"),
        ((EMB[:, 0], WHO, HEADS), {}, r"emb has shape \(24,\)"),
        ((EMB, WHO[None], HEADS), {}, r"people has shape \(1, 24\)"),
        ((EMB, ["ann"] * 24, HEADS), {}, "24 images of 1 person: impostor pairs need two"),
        ((EMB, np.arange(24), HEADS), {}, "24 people, each with one: there is no genuine pair"),
        ((EMB, WHO, {}), {}, "no heads to compare"),
        ((EMB, WHO, HEADS), {"fmrs": ()}, "fmrs are"),
        ((EMB, WHO, HEADS), {"fmrs": (0.1, 1.0)}, "fmrs are .*between 0 and 1"),
        (
            (EMB, WHO, HEADS),
            {"reference": "abs"},
            "reference names the head 'abs', and the heads given are threshold, taxi",
        ),
        ((EMB, WHO, HEADS), {"thresholds": {"abs": {0.1: 1.0}}}, "thresholds names the head 'abs'"),
        ((EMB, WHO, HEADS), {"thresholds": {"taxi": {0.1: np.nan}}}, "threshold of taxi for FMR 0.1 is nan"),
        ((EMB, WHO, HEADS), {"level": 95}, "level is 95"),
        ((EMB, WHO, HEADS), {"draws": 39}, "39 draws leave none outside"),
        ((EMB, WHO, HEADS), {"tile": 0}, "tile is 0"),
    ],
)
def test_bad_input_is_told(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        compare_all(*arguments, **{"draws": 40, **options})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_a_score_that_is_not_finite_names_the_rows(value):
    emb, who = photos(1)

    class Broken(Nearness):
        def cross_scores(self, a, b):
            found = super().cross_scores(a, b)
            found[np.ix_((a == emb[7]).all(axis=1), (b == emb[11]).all(axis=1))] = value
            found[np.ix_((a == emb[11]).all(axis=1), (b == emb[7]).all(axis=1))] = value
            return found

    alike = {k for k in range(24) if (emb[k] == emb[7]).all() or (emb[k] == emb[11]).all()}
    with pytest.raises(ValueError, match=r"head bad gives the score \S+ to the images in rows (\d+) and (\d+)") as told:
        compare_all(emb, who, {"bad": Broken()}, draws=40, tile=5)
    words = str(told.value).replace(".", " ").split()
    assert {int(words[-3]), int(words[-1])} <= alike


def test_a_head_that_gives_too_few_scores_is_told():
    class Diagonal(Nearness):
        def cross_scores(self, a, b):
            return np.zeros(len(a))

    with pytest.raises(ValueError, match=r"head bad gives scores \(\d+,\) for \d+ and \d+ images"):
        compare_all(EMB, WHO, {"bad": Diagonal()}, draws=40)


def test_more_than_memory_is_meant_for_is_refused_beforehand(monkeypatch):
    emb, who = unit(14)
    monkeypatch.setattr(dense, "MAX_GENUINE", 100)
    with pytest.raises(
        ValueError, match="genuine pairs are more than the 100 .* images. Take fewer images of a person"
    ):
        compare_all(emb, who, HEADS, draws=40)
    monkeypatch.setattr(dense, "MAX_GENUINE", 10**6)
    monkeypatch.setattr(dense, "MAX_TAIL", 1000)
    with pytest.raises(ValueError, match="an FMR of 0.5 of .* impostor pairs means keeping"):
        compare_all(emb, who, HEADS, fmrs=(0.5,), draws=40)
    with pytest.raises(ValueError, match="the threshold -100, given for it, accepts more than 1,000 impostor pairs"):
        compare_all(emb, who, HEADS, thresholds={"taxi": {0.1: -100.0}}, draws=40, tile=10)

    class Constant(Nearness):
        def cross_scores(self, a, b):
            return np.ones((len(a), len(b)))

    with pytest.raises(ValueError, match="the score 1 ties more than 1,000 impostor pairs"):
        compare_all(emb, who, {"flat": Constant()}, draws=40, tile=10)


def test_with_one_genuine_person_draws_without_them_are_left_out():
    rng = np.random.default_rng(0)
    emb = rng.normal(size=(12, 4))
    results = compare_all(emb, [0, 0, *range(1, 11)], {"near": Nearness()}, fmrs=(0.1,), draws=400)
    assert 0.5 < results.draws / 400 < 0.75  # 1 - exp(-1) of them have the one person

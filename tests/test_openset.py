"""Identification's statistics against galleries listed one by one, and against populations that are known."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faceembed.identification import openset
from faceembed.identification.openset import Mated, NonMated


def some_searches(seed: int, *, strangers: int = 5, people: int = 6, own: bool = False) -> NonMated:
    """Scores on a grid, so that there are ties; with `own`, strangers who are in the pool themselves."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 8, (strangers, people)) / 4.0
    who = np.arange(strangers) if own else 100 + rng.integers(0, 3, strangers)
    if own:
        scores[np.arange(strangers), np.arange(strangers)] = -np.inf
    return NonMated(scores=scores, who=who, pool=np.arange(people))


def listed_fpir(non_mated: NonMated, k: int, threshold: float) -> float:
    """Over every gallery that there is, search by search; strangers weigh equally."""
    per_person: dict[int, list[float]] = {}
    for row, who in zip(non_mated.scores, non_mated.who.tolist(), strict=True):
        there = row[row > -np.inf]
        galleries = list(itertools.combinations(there.tolist(), k))
        per_person.setdefault(who, []).append(sum(max(g) >= threshold for g in galleries) / len(galleries))
    return float(np.mean([np.mean(found) for found in per_person.values()]))


@given(pool=st.integers(1, 60), data=st.data())
def test_chances_are_those_of_the_binomials(pool, data):
    k = data.draw(st.integers(0, pool))
    m = np.arange(pool + 1)
    expected = [math.comb(pool - int(i), k) / math.comb(pool, k) for i in m]
    np.testing.assert_allclose(openset.none_drawn(m, pool, k), expected, rtol=1e-12, atol=0)


def test_chances_are_exact_for_large_pools_and_extrapolate_beyond_them():
    exact = math.comb(100_000 - 37, 5_000) / math.comb(100_000, 5_000)
    assert openset.none_drawn(37, 100_000, 5_000) == pytest.approx(exact, rel=1e-11)
    assert openset.none_drawn(3, 10, 25) == pytest.approx(0.7**25)
    assert openset.none_drawn(0, 10, 10) == 1
    with pytest.raises(ValueError, match="a pool has one person or more"):
        openset.none_drawn(0, 0, 1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 5), step=st.integers(0, 9), own=st.booleans())
def test_fpir_is_that_of_all_galleries_listed(seed, k, step, own):
    non_mated = some_searches(seed, own=own)
    found = openset.fpir(non_mated, k, step / 4)
    assert found.value == pytest.approx(listed_fpir(non_mated, k, step / 4), abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 6), step=st.integers(-1, 8), rank=st.integers(1, 4))
def test_tpir_is_that_of_all_galleries_listed(seed, k, step, rank):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 8, (4, 6)) / 4.0
    mated = Mated(scores=scores, mate=np.array([0, 0, 3, 5]), pool=np.arange(6))
    threshold = step / 4 if step >= 0 else -np.inf
    per_person: dict[int, list[float]] = {}
    for row, mate in zip(scores, mated.mate.tolist(), strict=True):
        others = [float(row[j]) for j in range(6) if j != mate]
        galleries = list(itertools.combinations(others, k - 1))
        hits = [sum(s >= row[mate] for s in g) < rank and row[mate] >= threshold for g in galleries]
        per_person.setdefault(mate, []).append(float(np.mean(hits)))
    expected = np.mean([np.mean(found) for found in per_person.values()])
    found = openset.tpir(mated, k, threshold, rank=rank)
    assert found.value == pytest.approx(expected, abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_the_whole_cmc_rises_to_one_and_equals_rank_by_rank():
    rng = np.random.default_rng(3)
    mated = Mated(scores=rng.normal(size=(40, 20)), mate=np.arange(40) % 20, pool=np.arange(20))
    curve = openset.cmc(mated, 8, range(1, 9))
    assert (np.diff(curve) > 0).all()
    assert curve[-1] == pytest.approx(1)
    # The K = M gallery is the one that is there: ranks can be counted.
    ranks = 1 + mated.ahead
    counted = [(ranks <= r).mean() for r in range(1, 21)]
    np.testing.assert_allclose(openset.cmc(mated, 20, range(1, 21)), counted, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 5), target=st.floats(0.02, 0.6), own=st.booleans())
def test_a_threshold_is_the_lowest_that_keeps_the_target(seed, k, target, own):
    non_mated = some_searches(seed, own=own)
    best = openset.ranked(non_mated, share=0.6)
    threshold = openset.threshold_at_fpir(best, k, target)
    assert openset.fpir(non_mated, k, threshold).value <= target + 1e-9
    below = non_mated.scores[non_mated.scores < threshold]
    if below.max() > -np.inf:
        assert openset.fpir(non_mated, k, float(below.max())).value > target


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 5), own=st.booleans())
def test_ranked_scores_give_the_fpir_at_each_of_them(seed, k, own):
    non_mated = some_searches(seed, own=own)
    best = openset.ranked(non_mated, share=0.9)
    curve = best.fpir(k)
    for score in np.unique(best.score):
        here = curve[np.flatnonzero(best.score == score)[-1]]  # ties are answered together
        assert here == pytest.approx(openset.fpir(non_mated, k, float(score)).value, abs=1e-12)


def test_a_threshold_just_above_a_float32_score_refuses_it():
    scores = np.array([[0.1, 0.2], [0.3, 0.2]], np.float32)
    non_mated = NonMated(scores=scores, who=np.array([7, 8]), pool=np.arange(2))
    threshold = openset.threshold_at_fpir(openset.ranked(non_mated, share=0.9), 2, 0.4)
    assert openset.fpir(non_mated, 2, threshold).value == 0


def test_the_naive_curve_is_only_right_where_comparisons_are_independent():
    rng = np.random.default_rng(0)
    free = NonMated(scores=rng.normal(size=(2000, 50)), who=np.arange(2000), pool=np.arange(50))
    assert openset.naive(free, 20, 2.5) == pytest.approx(openset.fpir(free, 20, 2.5).value, abs=0.005)
    # Strangers differ in how much they look like others: their matches come together.
    wolves = free.scores + 1.5 * rng.normal(size=(2000, 1))
    unlike = NonMated(scores=wolves, who=np.arange(2000), pool=np.arange(50))
    assert openset.naive(unlike, 20, 4.0) > 1.3 * openset.fpir(unlike, 20, 4.0).value


def population(rng, strangers, people):
    """Strangers and enrolled people of whom some attract matches: scores, and p_i(T) is known for each stranger."""
    wolf = 0.7 * rng.normal(size=(strangers, 1))
    lamb = 0.5 * rng.normal(size=(1, people))
    return wolf + lamb + rng.normal(size=(strangers, people))


def true_fpir(k, threshold, draws=400_000):
    """Of `population`: the best of k others has lamb + noise, of standard deviation √1.25, and all share the wolf."""
    rng = np.random.default_rng(1)
    from scipy.stats import norm

    wolf = 0.7 * rng.normal(size=draws)
    p = norm.sf((threshold - wolf) / math.sqrt(1.25))
    return float(np.mean(1 - (1 - p) ** k))


@pytest.mark.parametrize(("k", "threshold"), [(10, 3.8), (60, 4.6), (60, 3.6)])
def test_intervals_hold_the_rate_of_the_population(k, threshold):
    truth = true_fpir(k, threshold)
    rng = np.random.default_rng(k)
    inside, values = 0, []
    for _ in range(300):
        scores = population(rng, 150, 60)
        found = openset.fpir(NonMated(scores=scores, who=np.arange(150), pool=np.arange(60) + 1000), k, threshold)
        inside += found.low <= truth <= found.high
        values.append(found.value)
    assert np.mean(values) == pytest.approx(truth, abs=4 * np.std(values) / math.sqrt(300))  # without bias
    assert inside / 300 >= 0.92


def test_intervals_over_strangers_alone_would_be_too_narrow():
    """The enrolled people's part matters: lambs make galleries differ."""
    rng = np.random.default_rng(2)
    truth = true_fpir(60, 3.6)
    alone = 0
    for _ in range(200):
        scores = population(rng, 1000, 60)
        row = (scores >= 3.6).any(axis=1)
        half = 1.96 * math.sqrt(row.mean() * (1 - row.mean()) / 1000)
        alone += abs(row.mean() - truth) <= half
    assert alone / 200 < 0.8


def test_tpir_intervals_hold_the_rate_of_the_population():
    rng = np.random.default_rng(4)
    truth_rng = np.random.default_rng(5)

    def draw(r, people):
        scores = population(r, people, people)
        scores[np.arange(people), np.arange(people)] += 2.5
        return Mated(scores=scores, mate=np.arange(people), pool=np.arange(people))

    truth = np.mean([openset.tpir(draw(truth_rng, 300), 40, 2.0).value for _ in range(60)])
    inside = 0
    for _ in range(200):
        found = openset.tpir(draw(rng, 80), 40, 2.0)
        inside += found.low <= truth <= found.high
    assert inside / 200 >= 0.92


def test_the_people_enrolled_are_in_the_interval_of_tpir():
    """Impostors who outrank everybody: leaving one out moves many searches, and the interval must know."""
    rng = np.random.default_rng(11)

    def draw(r, people):
        scores = 1.5 * r.normal(size=(1, people)) + r.normal(size=(people, people))
        scores[np.arange(people), np.arange(people)] += 4.0 - scores.max(axis=0) * 0
        return Mated(scores=scores, mate=np.arange(people), pool=np.arange(people))

    truth = np.mean([openset.tpir(draw(rng, 400), 30).value for _ in range(40)])
    found = [openset.tpir(draw(rng, 60), 30) for _ in range(300)]
    held = np.mean([rate.low <= truth <= rate.high for rate in found])
    assert 0.92 <= held <= 0.995
    # Taken over those who search alone, it would be a binomial's.
    searchers = np.mean([2 * 1.96 * math.sqrt(rate.value * (1 - rate.value) / 60) for rate in found])
    assert abs(np.mean([rate.high - rate.low for rate in found]) / searchers - 1) > 0.05


@pytest.mark.parametrize("strangers", [1, 2, 3, 6])
def test_few_strangers_say_little(strangers):
    truth = true_fpir(10, 3.0)
    rng = np.random.default_rng(strangers)
    inside = 0
    for _ in range(300):
        scores = population(rng, strangers, 300)
        found = openset.fpir(NonMated(scores=scores, who=np.arange(strangers), pool=np.arange(300) + 50), 10, 3.0)
        inside += found.low <= truth <= found.high
    assert inside / 300 >= 0.9


def test_beyond_the_pool_nobody_is_taken_back():
    """A larger gallery never lets in fewer strangers, nor finds more people, than the whole pool did."""
    non_mated = some_searches(3, strangers=40, people=8)
    whole = openset.fpir(non_mated, 8, 1.5).value
    lows = [openset.bracket(non_mated, k, 1.5)[0] for k in (8, 9, 12, 100)]
    assert lows[0] == whole
    assert (np.diff(lows) >= 0).all()
    with pytest.raises(ValueError, match="`bracket` says what is known beyond"):
        openset.fpir(non_mated, 9, 1.5)
    rng = np.random.default_rng(0)
    mated = Mated(scores=rng.normal(size=(8, 8)) + 2 * np.eye(8), mate=np.arange(8), pool=np.arange(8))
    found = [openset.tpir(mated, k).value for k in (8, 9, 12, 100)]
    assert (np.diff(found) <= 0).all()


def test_searches_that_share_no_comparison_are_counted_once():
    apart = NonMated(scores=np.zeros((6, 10)), who=np.arange(6) + 100, pool=np.arange(10))
    assert [apart.searches(k) for k in (1, 3, 5, 10)] == [60, 18, 12, 6]
    scores = np.zeros((10, 10))
    np.fill_diagonal(scores, -np.inf)
    among = NonMated(scores=scores, who=np.arange(10), pool=np.arange(10))
    assert among.searches(1) == 45  # pairs of ten people
    assert openset.ranked(among, share=0.5).searches(3) == openset.ranked(among, share=0.5).single * 3


def test_beyond_the_pool_the_truth_lies_within_the_bracket():
    rng = np.random.default_rng(6)
    k, threshold = 400, 5.4
    truth = true_fpir(k, threshold)
    ends = []
    for _ in range(150):
        scores = population(rng, 300, 80)
        non_mated = NonMated(scores=scores, who=np.arange(300), pool=np.arange(80) + 1000)
        ends.append(openset.bracket(non_mated, k, threshold))
        assert openset.bracket(non_mated, 80, threshold)[0] == openset.bracket(non_mated, 80, threshold)[1]
    low, high = np.mean(ends, axis=0)
    noise = 2 * np.std(ends, axis=0) / math.sqrt(150)
    assert low - noise[0] < truth < high + noise[1]
    assert high < 3 * truth  # and says something


def test_one_person_in_both_roles_counts_once():
    """Everybody against all others: what a person moves as a stranger and as one enrolled adds up before it is squared."""
    rng = np.random.default_rng(7)
    n = 60
    charm = 1.2 * rng.normal(size=n)
    scores = charm[:, None] + charm[None, :] + rng.normal(size=(n, n))
    np.fill_diagonal(scores, -np.inf)
    same = openset.fpir(NonMated(scores=scores, who=np.arange(n), pool=np.arange(n)), 20, 4.5)
    apart = openset.fpir(NonMated(scores=scores, who=np.arange(n), pool=np.arange(n) + 1000), 20, 4.5)
    assert same.value == apart.value
    assert same.high - same.low > 1.1 * (apart.high - apart.low)


def test_strangers_with_many_photos_weigh_as_those_with_one():
    scores = np.array([[9.0, 0], [9, 0], [9, 0], [0, 0]])
    many = NonMated(scores=scores, who=np.array([1, 1, 1, 2]), pool=np.arange(2))
    assert openset.fpir(many, 2, 5.0).value == pytest.approx(0.5)
    assert many.strangers == 2


def test_what_cannot_be_is_refused():
    good = some_searches(0)
    with pytest.raises(ValueError, match=r"give \[searches, pool\]"):
        NonMated(scores=good.scores, who=good.who[:-1], pool=good.pool)
    with pytest.raises(ValueError, match="NaN"):
        NonMated(scores=good.scores * np.nan, who=good.who, pool=good.pool)
    with pytest.raises(ValueError, match="one person or more"):
        openset.fpir(good, 0, 1.0)
    with pytest.raises(ValueError, match="columns 0 to 9"):
        Mated(scores=good.scores, mate=np.array([0, 1, 2, 3, 9]), pool=good.pool)
    best = openset.ranked(good, share=0.5)
    with pytest.raises(ValueError, match="galleries of 1 to 6"):
        best.fpir(7)
    with pytest.raises(ValueError, match="at most 0.5"):
        openset.threshold_at_fpir(best, 2, 0.7)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 5), more=st.integers(0, 3))
def test_larger_galleries_need_fewer_scores(seed, k, more):
    best = openset.ranked(some_searches(seed, strangers=9), share=0.4)
    fewer = best.from_size(k)
    assert len(fewer.score) <= len(best.score)
    for target in (0.05, 0.2, 0.4):
        k2 = min(6, k + more)
        assert openset.threshold_at_fpir(fewer, k2, target) == openset.threshold_at_fpir(best, k2, target)


def test_the_det_is_fpir_and_fnir_threshold_by_threshold():
    rng = np.random.default_rng(8)
    mated = Mated(scores=rng.normal(size=(30, 15)), mate=np.arange(30) % 15, pool=np.arange(15))
    mated.scores[np.arange(30), mated.mate] += 1.5
    non_mated = NonMated(scores=rng.normal(size=(80, 15)), who=np.arange(80) + 50, pool=np.arange(15))
    fpir, fnir = openset.det(openset.Searches(mated=mated, non_mated=non_mated), 6, least=0.05, points=9)
    best = openset.ranked(non_mated, share=0.5)
    for x, y in zip(fpir, fnir, strict=True):
        cut = openset.threshold_at_fpir(best, 6, float(x))
        assert y == pytest.approx(1 - openset.tpir(mated, 6, cut).value, abs=1e-12)

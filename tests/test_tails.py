"""Generalised Pareto tails: against SciPy's fit, against distributions whose tail is known, and by hiding it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import genpareto

from faceembed.identification import openset, tails
from faceembed.identification.openset import NonMated


def searches(strangers: int, people: int, seed: int = 0) -> NonMated:
    rng = np.random.default_rng(seed)
    scores = 0.5 * rng.normal(size=(strangers, 1)) + rng.normal(size=(strangers, people))
    return NonMated(scores=scores, who=np.arange(strangers), pool=np.arange(people) + strangers)


@pytest.mark.parametrize("shape", [-0.3, -0.1, 0.0, 0.2, 0.6])
def test_the_fit_is_scipys_where_every_excess_counts_once(shape):
    y = genpareto.rvs(shape, scale=0.3, size=400, random_state=np.random.default_rng(1))
    found = tails.fit_excess(y, np.ones(400))
    theirs, _, scale = genpareto.fit(y, floc=0)
    ours = genpareto.logpdf(y, found[0], scale=found[1]).sum()
    assert ours >= genpareto.logpdf(y, theirs, scale=scale).sum() - 1e-4  # at least as likely
    assert found == pytest.approx((theirs, scale), abs=5e-3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_weight_counts_as_so_many_excesses(seed):
    rng = np.random.default_rng(seed)
    y, count = rng.exponential(size=30), rng.integers(1, 4, 30)
    weighted, repeated = tails.fit_excess(y, count), tails.fit_excess(np.repeat(y, count), np.ones(count.sum()))
    assert weighted == pytest.approx(repeated, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(3, 60))
def test_no_other_shape_and_scale_is_more_likely(seed, n):
    rng = np.random.default_rng(seed)
    y = np.abs(rng.normal(size=n)) + 1e-6
    shape, scale = tails.fit_excess(y, np.ones(n))
    best = genpareto.logpdf(y, shape, scale=scale).sum()
    for other in np.linspace(-0.5, 1.5, 21):
        for size in scale * np.geomspace(0.3, 3, 21):
            assert genpareto.logpdf(y, other, scale=size).sum() <= best + 1e-6 * n


def test_the_shape_stays_where_the_likelihood_is_proper():
    y = 1 - np.random.default_rng(0).uniform(size=200) ** 3  # its density piles up at the upper end: ξ < -0.5
    shape, scale = tails.fit_excess(y, np.ones(200))
    assert shape == pytest.approx(-0.5, abs=1e-6)
    assert scale / 0.5 >= y.max()


def test_a_gallery_as_large_as_the_pool_has_one_maximum_a_stranger():
    non_mated = searches(400, 30)
    best = openset.ranked(non_mated)
    tail = tails.fit(best, 30)
    top = np.sort(non_mated.scores.max(axis=1))[::-1]
    excess = top[top > tail.at] - tail.at
    assert len(excess) == 40
    assert (tail.shape, tail.scale) == pytest.approx(tails.fit_excess(excess, np.ones(len(excess))), abs=1e-6)
    assert tail.share == pytest.approx(len(excess) / 400)
    assert tail.searches == pytest.approx(len(excess))


@given(target=st.floats(1e-7, 0.0999))
def test_thresholds_invert_rates(target):
    for shape in (-0.3, 0.0, 0.4):
        tail = tails.Tail(k=10, at=1.5, share=0.1, shape=shape, scale=0.2, searches=50.0)
        assert float(tail.fpir(tail.threshold(target))) == pytest.approx(target, rel=1e-6)


def test_beyond_an_upper_end_nobody_comes():
    tail = tails.Tail(k=10, at=1.0, share=0.1, shape=-0.5, scale=0.2, searches=50.0)
    assert tail.fpir([1.39, 1.4, 2.0]).tolist() == pytest.approx([0.1 * 0.025**2, 0, 0])
    with pytest.raises(ValueError, match="below it count"):
        tail.fpir(0.9)
    with pytest.raises(ValueError, match="give one below that"):
        tail.threshold(0.2)


def test_a_known_tail_is_met_a_hundred_times_beyond_what_was_seen():
    """Exponential scores: the best of 20 has the tail 20·exp(-x), and 1,000 strangers show a FPIR of 1 % and no less."""
    cuts = []
    for seed in range(40):
        scores = np.random.default_rng(seed).exponential(size=(1000, 20))
        best = openset.ranked(NonMated(scores=scores, who=np.arange(1000), pool=np.arange(20) + 1000))
        cuts.append(tails.fit(best, 20).threshold(1e-4))
    true = -np.log(1 - (1 - 1e-4) ** (1 / 20))
    realised = np.mean([1 - (1 - np.exp(-cut)) ** 20 for cut in cuts])
    assert np.median(cuts) == pytest.approx(true, rel=0.08)
    assert 2e-5 < realised < 1e-3


@pytest.mark.slow
def test_resampled_thresholds_hold_the_true_one():
    true = -np.log(1 - (1 - 1e-3) ** (1 / 20))
    inside = 0
    for seed in range(40):
        scores = np.random.default_rng(100 + seed).exponential(size=(600, 20))
        best = openset.ranked(NonMated(scores=scores, who=np.arange(600), pool=np.arange(20) + 1000))
        drawn = [tail.threshold(1e-3) for tail in tails.resampled(best, 20, draws=100, seed=seed)]
        low, high = np.quantile(drawn, [0.025, 0.975])
        inside += low <= true <= high
    assert inside >= 33  # 38 expected; small samples of tails hold a little less


def test_a_stranger_with_many_photos_is_resampled_as_one():
    non_mated = searches(100, 10)
    many = NonMated(scores=np.repeat(non_mated.scores, 5, axis=0), who=np.repeat(non_mated.who, 5), pool=non_mated.pool)
    spread = [
        np.std([tail.threshold(0.01) for tail in tails.resampled(openset.ranked(s), 10, draws=100)])
        for s in (non_mated, many)
    ]
    assert spread[1] == pytest.approx(spread[0], rel=0.3)  # and not √5 less


def test_stability_and_backtest_agree_with_the_population():
    best = openset.ranked(searches(3000, 40))
    found = tails.stability(best, 40, 0.001, draws=30)
    assert (np.diff(found.share) < 0).all()
    assert found.target < found.share.min()
    assert ((found.low <= found.threshold) & (found.threshold <= found.high)).all()
    assert np.ptp(found.threshold) < 0.5


@pytest.mark.parametrize(("target", "shown"), [(0.005, 600), (0.01, 300)])
def test_hidden_strangers_come_as_rarely_as_asked_for(target, shown):
    """Down to three strangers in expectation."""
    best = openset.ranked(searches(3000, 40))
    hidden = tails.backtest(best, 40, target, shown=shown, draws=60)
    assert (hidden.fitted_on, hidden.others, hidden.expected) == (shown, 3000 - shown, pytest.approx(shown * target))
    assert hidden.low < target < hidden.high
    assert 0.6 < hidden.realised / target < 1.25


def test_those_who_are_shown_do_not_judge():
    """Of 40 strangers 20 are far above the others: shown alone, they set a threshold that the others never reach."""
    scores = np.concatenate([np.full((20, 1), 10.0), np.zeros((20, 1))]) + np.random.default_rng(0).uniform(
        0, 1, (40, 5)
    )
    best = openset.ranked(NonMated(scores=scores, who=np.arange(40), pool=np.arange(5) + 100), share=0.9)
    found = [tails.backtest(best, 5, 0.3, shown=20, share=0.8, draws=1, seed=seed) for seed in range(30)]
    assert all(0 <= one.realised <= 1 for one in found)
    # What is shown and what is judged add up to all: with most high ones shown few are left to come.
    assert np.std([one.realised for one in found]) > 0.03
    with pytest.raises(ValueError, match="some must be, and some must judge"):
        tails.backtest(best, 5, 0.3, shown=40)


def test_a_cautious_threshold_is_what_nine_in_ten_tails_accept():
    drawn = [tails.Tail(k=5, at=1.0, share=0.1, shape=0.0, scale=s, searches=9.0) for s in np.linspace(0.1, 1.1, 11)]
    cut = tails.cautious_threshold(drawn, 0.01)
    assert sum(float(tail.fpir(cut)) <= 0.01 + 1e-12 for tail in drawn) == 10


def test_too_few_excesses_are_refused():
    for excess in ([], [0.1], [0.1, 0.1], [0.1, -0.1]):
        with pytest.raises(ValueError, match="two different positive ones"):
            tails.fit_excess(excess, np.ones(len(excess)))


def test_millions_of_excesses_are_grouped_without_moving_the_tail():
    y = np.sort(genpareto.rvs(-0.2, scale=0.3, size=60_000, random_state=np.random.default_rng(2)))[::-1]
    weight = np.random.default_rng(3).uniform(0, 1, 60_000)
    grouped = tails._grouped(y, weight)
    assert len(grouped[0]) == 4000
    assert (grouped[1].sum(), grouped[0] @ grouped[1]) == pytest.approx((weight.sum(), weight @ y))
    assert tails.fit_excess(*grouped) == pytest.approx(tails.fit_excess(y, weight), abs=2e-4)

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faceembed import metrics, uncertainty
from faceembed.uncertainty import dyadic_covariance, dyadic_interval, dyadic_variance, wilson_interval


def random_pairs(seed, n, people):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, people, (2, n))
    return rng.normal(size=n), a, b


@settings(deadline=None, max_examples=80)
@given(seed=st.integers(0, 2**31 - 1), n=st.integers(1, 30), people=st.integers(1, 40))
def test_variance_equals_the_double_loop_over_pairs_that_share_a_person(seed, n, people):
    residual, a, b = random_pairs(seed, n, people)
    loop = sum(
        residual[p] * residual[q] for p, q in itertools.product(range(n), repeat=2) if {a[p], b[p]} & {a[q], b[q]}
    )
    assert dyadic_variance(residual, a, b) == pytest.approx(loop / n**2, abs=1e-12)


def test_variance_ignores_which_side_is_which_and_what_people_are_called():
    residual, a, b = random_pairs(3, 200, 30)
    expected = dyadic_variance(residual, a, b)
    swap = np.arange(200) % 3 == 0
    names = np.array([f"person {(7 * i) % 30:02d}" for i in range(30)])
    assert dyadic_variance(residual, np.where(swap, b, a), np.where(swap, a, b)) == pytest.approx(expected, rel=1e-12)
    assert dyadic_variance(residual, names[a], names[b]) == pytest.approx(expected, rel=1e-12)


def test_without_shared_people_it_is_wilsons_interval():
    correct = np.arange(50) % 5 > 0
    dyadic = dyadic_interval(correct, np.arange(50), np.arange(50) + 50)
    # Each person has a 50th of the impostor pairs: 50 pairs say what 49²/50 would if people could not pull.
    assert dyadic.n_effective == pytest.approx(49**2 / 50)
    # 100 people: Student's quantile with 99 degrees of freedom is 1.9842, which is a normal one at 95.2768 %.
    assert (dyadic.low, dyadic.high) == pytest.approx(metrics.wilson(0.8, 49**2 / 50, level=0.9527683), abs=1e-6)
    plain = wilson_interval(correct)
    assert (plain.low, plain.high) == metrics.wilson(0.8, 50)


def test_each_pair_ten_times_counts_once():
    correct = np.repeat(np.arange(40) % 4 > 0, 10)
    a, b = np.repeat(np.arange(40), 10), np.repeat(np.arange(40) + 40, 10)
    assert dyadic_interval(correct, a, b).n_effective == pytest.approx(39**2 / 40)


def test_a_variance_below_independence_is_taken_for_noise():
    # Every person is right once and wrong once: the covariance cancels the variance altogether.
    correct, people = np.tile([True, False], 20), np.repeat(np.arange(20), 2)
    assert dyadic_variance(correct - 0.5, people, people) == 0
    assert dyadic_interval(correct, people, people).n_effective == 40


def test_no_error_at_all_leaves_an_interval_as_wide_as_the_people_allow():
    people = np.arange(300) % 12
    interval = dyadic_interval(np.ones(300, bool), people, people)
    assert interval.n_effective == 12
    assert (interval.low, interval.high) == metrics.wilson(1, 12)


def test_coverage_when_people_differ():
    """About 3 pairs a person, some people much harder: 95 % intervals must hold, and Wilson's must be seen to fail."""
    rng = np.random.default_rng(11)
    people, n, spread, centre = 150, 600, 1.0, 1.2
    a = rng.integers(0, people, n)
    b = np.where(np.arange(n) % 2 == 0, a, (a + rng.integers(1, people, n)) % people)
    truth = NormalDist().cdf(centre / np.sqrt(1 + spread**2))
    held = np.zeros((400, 2), bool)
    for i in range(len(held)):
        person = rng.normal(size=people) * spread
        effect = np.where(a == b, person[a], (person[a] + person[b]) / np.sqrt(2))
        correct = centre + effect + rng.normal(size=n) > 0
        intervals = dyadic_interval(correct, a, b), wilson_interval(correct)
        held[i] = [interval.low <= truth <= interval.high for interval in intervals]
    dyadic, independent = held.mean(axis=0)
    assert 0.91 <= dyadic <= 0.985
    assert independent < 0.89
    assert dyadic_interval(correct, a, b, level=0.5).high < dyadic_interval(correct, a, b).high


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dyadic_variance([], [], []), "at least one pair"),
        (lambda: dyadic_variance([1.0, np.nan], [1, 2], [3, 4]), r"not finite, first at rows \[1\]"),
        (lambda: dyadic_variance([1.0, 2.0], [1], [3, 4]), r"people \(1,\) and \(2,\) for 2 pairs"),
        (lambda: dyadic_interval([0, 2], [1, 2], [3, 4]), "only 0 and 1"),
        (lambda: dyadic_interval([], [], []), "at least one pair"),
        (lambda: wilson_interval([]), "at least one pair"),
    ],
)
def test_unusable_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- several figures at once ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31 - 1), n=st.integers(2, 25), people=st.integers(2, 30))
def test_covariance_equals_the_double_loop(seed, n, people):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, people, (2, n))
    r = rng.normal(size=(3, n))
    meet = np.array([[bool({a[p], b[p]} & {a[q], b[q]}) for q in range(n)] for p in range(n)])
    np.testing.assert_allclose(dyadic_covariance(r, a, b), r @ meet @ r.T / n**2, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31 - 1), n=st.integers(4, 25), people=st.integers(3, 12))
def test_leverage_makes_a_persons_sum_what_leaving_them_out_moves_the_figure_by(seed, n, people):
    """Of genuine pairs alone nobody shares a couple: the variance is the sum of squared leave-one-person-out changes."""
    rng = np.random.default_rng(seed)
    who, value = rng.integers(0, people, n), rng.normal(size=n)
    if len(set(who)) < 2:
        return
    mean = value.mean()
    moved = [value[who != person].mean() - mean for person in set(who)]
    found = dyadic_covariance((value - mean)[None], who, who, leverage=True)[0, 0]
    assert found == pytest.approx(np.square(moved).sum(), rel=1e-9, abs=1e-15)


def test_leverage_by_loop_and_by_kind():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, (2, 30))
    same = a == b
    r = rng.normal(size=(2, 30))

    def pull(person, kind):
        own = sum(kind[p] and person in (a[p], b[p]) for p in range(30))
        return kind.sum() / (kind.sum() - own)

    total = np.zeros((2, 2))
    for p, q in itertools.product(range(30), repeat=2):
        shared = {a[p], b[p]} & {a[q], b[q]}
        kinds = [same if same[i] else ~same for i in (p, q)]
        factors = [pull(s, kinds[0]) * pull(s, kinds[1]) for s in shared]
        # A couple is counted for both people; their geometric mean stands for the one that is too many.
        extra = math.prod(factors) ** 0.5 if len(factors) == 2 else 0.0
        total += np.outer(r[:, p], r[:, q]) * (sum(factors) - extra)
    np.testing.assert_allclose(dyadic_covariance(r, a, b, leverage=True), total / 900, rtol=1e-10)


def test_somebody_with_all_pairs_of_a_kind_leaves_a_finite_interval():
    people = np.zeros(8, int), np.array([0, 0, 0, 0, 1, 2, 3, 4])
    interval = dyadic_interval([1, 0, 1, 1, 1, 0, 1, 1], *people)
    assert 0 < interval.low < 0.75 < interval.high < 1


def scored(seed, n=40, ties=True):
    rng = np.random.default_rng(seed)
    same = np.arange(n) % 3 == 0
    scores = rng.normal(size=n) + same
    return (scores.round(1) if ties else scores), same


@pytest.mark.parametrize("seed", range(4))
def test_auc_influence_is_delongs_by_loop(seed):
    scores, same = scored(seed)
    above = lambda g, i: float(g > i) + float(g == i) / 2  # noqa: E731
    genuine, impostor = scores[same], scores[~same]
    area = np.mean([[above(g, i) for i in impostor] for g in genuine])
    expected = np.empty(len(same))
    expected[same] = [(np.mean([above(g, i) for i in impostor]) - area) * len(same) / len(genuine) for g in genuine]
    expected[~same] = [(np.mean([above(g, i) for g in genuine]) - area) * len(same) / len(impostor) for i in impostor]
    found = uncertainty.auc_influence(scores, same)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found.sum() == pytest.approx(0, abs=1e-9)
    # DeLong's variance has m - 1 and n - 1 where the plug-in has m and n.
    v10, v01 = expected[same] * len(genuine) / len(same), expected[~same] * len(impostor) / len(same)
    delong = v10.var(ddof=1) / len(genuine) + v01.var(ddof=1) / len(impostor)
    plug_in = np.square(found).sum() / len(same) ** 2
    assert plug_in == pytest.approx(v10.var() / len(genuine) + v01.var() / len(impostor), rel=1e-9)
    assert plug_in < delong < plug_in * 1.1


def test_matched_tar_influence_is_the_spread_of_the_figure_over_new_data():
    """Delta method against brute force: 4,000 fresh lists of independent pairs."""
    rng = np.random.default_rng(0)
    same = np.arange(2000) % 2 == 0
    tars, spreads = [], []
    for draw in range(4000):
        scores = rng.normal(size=2000) + 2.0 * same
        tars.append(metrics.matched_tar(scores, same, 0.1).tar)
        if draw < 100:
            r = uncertainty.matched_tar_influence(scores, same, 0.1)
            assert r.mean() == pytest.approx(0, abs=1e-9)
            spreads.append(math.sqrt(np.square(r).sum()) / 2000)
    assert np.mean(spreads) == pytest.approx(np.std(tars), rel=0.06)
    # Without the noise of the threshold it would be half of that.
    fixed = math.sqrt(0.764 * 0.236 / 1000)
    assert np.mean(spreads) > 1.3 * fixed


def test_an_accepted_impostor_costs_true_accepts_and_shares_the_sign_with_refused_genuine_pairs():
    """40 genuine and 40 impostor pairs on even ladders: the slope of the ROC at FAR 1/4 is 1."""
    same = np.arange(80) % 2 == 0
    scores = np.repeat(np.arange(40.0), 2)
    r = uncertainty.matched_tar_influence(scores, same, 0.25)
    accepted = scores >= 30
    np.testing.assert_allclose(r[same], np.where(accepted[same], 0.75, -0.25) * 2, atol=1e-12)
    np.testing.assert_allclose(r[~same], np.where(accepted[~same], -0.75, 0.25) * 2, rtol=0.06)


def test_an_auc_may_be_surer_than_as_many_coin_tosses_as_pairs():
    scores, same = scored(0, n=400, ties=False)
    area, r = metrics.auc(scores, same), uncertainty.auc_influence(scores, same)
    effective = area * (1 - area) * 400**2 / np.square(r).sum()
    assert uncertainty.rate_interval(area, r, None, None) == pytest.approx(metrics.wilson(area, effective))
    compact = r / 3  # a figure of a third of that error
    assert uncertainty.rate_interval(area, compact, None, None) == pytest.approx(metrics.wilson(area, 9 * effective))
    added = area * (1 - area) / effective
    assert uncertainty.rate_interval(area, r, None, None, extra=added) == pytest.approx(
        metrics.wilson(area, effective / 2)
    )


# ---- differences ---------------------------------------------------------------------------------------------------------


def test_one_difference_is_the_estimate_and_its_normal_interval():
    rng = np.random.default_rng(0)
    gap = rng.normal(size=500)
    [d] = uncertainty.differences([gap - gap.mean()], [gap.mean()], None, None)
    error = gap.std() / math.sqrt(500)
    assert (d.estimate, d.standard_error) == (gap.mean(), pytest.approx(error))
    assert (d.low, d.high) == pytest.approx((gap.mean() - 1.959964 * error, gap.mean() + 1.959964 * error), rel=1e-6)
    assert (d.simultaneous_low, d.simultaneous_high) == (d.low, d.high)
    assert d.detectable == pytest.approx((1.959964 + 0.841621) * error, rel=1e-5)
    assert "ALL pairs are independent" in d.assumes


@pytest.mark.parametrize(("correlation", "critical"), [(0.0, 2.388), (0.9999, 1.960)])
def test_simultaneous_intervals_know_how_alike_heads_are(correlation, critical):
    """Three independent t's need 2.388 (Šidák); three that are one need 1.96."""
    rng = np.random.default_rng(1)
    common, own = rng.normal(size=200_000), rng.normal(size=(3, 200_000))
    r = math.sqrt(correlation) * common + math.sqrt(1 - correlation) * own
    r -= r.mean(axis=1, keepdims=True)
    found = uncertainty.differences(r, [0.0] * 3, None, None, draws=200_000)
    for d in found:
        assert d.simultaneous_high / d.standard_error == pytest.approx(critical, abs=0.02)
        assert d.high / d.standard_error == pytest.approx(1.960, abs=0.001)


def test_few_people_take_students_quantile():
    """With 6 people: 2.5706 alone, and for two uncorrelated figures at once 3.0905 (bivariate t, by quadrature)."""
    people = np.arange(6)
    r = np.array([[1.0, -1.0, 1.0, -1.0, 0.0, 0.0], [1.0, 1.0, -1.0, -1.0, 0.0, 0.0]])
    found = uncertainty.differences(r, [0.0, 0.0], people, people, draws=400_000)
    for d in found:
        assert d.high / d.standard_error == pytest.approx(2.5706, abs=1e-4)
        assert d.simultaneous_high / d.standard_error == pytest.approx(3.0905, abs=0.02)
    [unknown] = uncertainty.differences(r[:1], [0.0], None, None)
    assert unknown.high / unknown.standard_error == pytest.approx(1.95996, abs=1e-4)
    low, high = uncertainty.rate_interval(0.5, r[0], people, people)
    effective = 0.25 / found[0].standard_error ** 2
    # Wilson's interval at one half: ± q / (2 √(n + q²)).
    assert high - low == pytest.approx(2.5706 / math.sqrt(effective + 2.5706**2), rel=1e-4)


def test_differences_over_people_use_the_sandwich_and_never_less_than_independence():
    rng = np.random.default_rng(2)
    people = np.repeat(np.arange(40), 5)
    shared = rng.normal(size=40)[people] + 0.1 * rng.normal(size=200)
    alternating = np.tile([1.0, -1.0, 1.0, -1.0, 0.0], 40)
    r = np.stack([shared - shared.mean(), alternating])
    together, apart = uncertainty.differences(r, [0.0, 0.0], people, people)
    expected = dyadic_covariance(r, people, people, leverage=True)[0, 0]
    assert together.standard_error == pytest.approx(math.sqrt(expected))
    assert together.standard_error > 2 * math.sqrt(np.square(r[0]).sum()) / 200
    assert apart.standard_error == pytest.approx(math.sqrt(np.square(r[1]).sum()) / 200)


def test_a_variance_that_is_raised_keeps_its_correlations():
    """Two heads that differ from the reference alike are one comparison, whether or not the sandwich was too low."""
    people = np.repeat(np.arange(60), 4)
    r = np.tile([1.0, -0.9, 1.0, -1.1], 60)
    assert dyadic_variance(r, people, people) < np.square(r).sum() / len(r) ** 2
    for d in uncertainty.differences(np.stack([r, 2 * r]), [0.0, 0.0], people, people):
        assert d.simultaneous_high == pytest.approx(d.high, rel=0.03)


def test_heads_that_decide_alike_are_not_proved_equal():
    people = np.arange(60) % 30
    first, second = uncertainty.differences(np.zeros((2, 60)), [0.0, 0.0], people, people)
    assert (first.low, first.high, first.standard_error) == (-0.1, 0.1, 0.0)
    assert first == second
    one, other = uncertainty.differences(np.stack([np.zeros(60), np.tile([1.0, -1.0], 30)]), [0, 0], None, None)
    assert one.high == 3 / 60
    assert other.simultaneous_high == pytest.approx(other.high, rel=0.02)  # a family of one that moves


def test_variance_from_elsewhere_is_added():
    r = np.tile([1.0, -1.0], 50)[None]
    [plain] = uncertainty.differences(r, [0.0], None, None)
    [more] = uncertainty.differences(r, [0.0], None, None, extra=[[3 * plain.standard_error**2]])
    assert more.standard_error == pytest.approx(2 * plain.standard_error)
    correct, people = np.arange(100) % 5 > 0, np.arange(100)
    given = dyadic_interval(correct, people, people)
    wider = dyadic_interval(correct, people, people, extra=0.8 * 0.2 / given.n_effective)
    assert wider.n_effective == pytest.approx(given.n_effective / 2)
    assert "training people" in wider.assumes


def test_mcnemar_by_hand():
    found = uncertainty.mcnemar([1, 1, 1, 0, 0, 1], [0, 0, 1, 1, 0, 0])
    # Three and one of four: 2·(1 + 4)/16.
    assert (found.only_first, found.only_second, found.p) == (3, 1, pytest.approx(10 / 16))
    assert uncertainty.mcnemar([1, 0], [1, 0]).p == 1.0
    assert uncertainty.mcnemar([0, 0, 0, 1], [0, 0, 1, 1]).only_second == 1  # wrong together twice counts for neither
    with pytest.raises(ValueError, match=r"decisions \(2,\) and \(3,\)"):
        uncertainty.mcnemar([1, 0], [1, 0, 1])


# ---- weights -----------------------------------------------------------------------------------------------------------


def test_weights_of_people_have_their_distribution():
    poisson = uncertainty.vertex_weights(500, 200, 0).astype(float)
    double = uncertainty.vertex_weights(500, 200, 0, "double").astype(float)
    for weights in (poisson, double):
        assert weights.mean() == pytest.approx(1, abs=0.01)
        assert weights.var() == pytest.approx(1, abs=0.02)
    assert set(np.unique(double)) == {0, 2}
    assert (poisson == 0).mean() == pytest.approx(math.exp(-1), abs=0.01)
    with pytest.raises(ValueError, match="kind is 'triple'"):
        uncertainty.vertex_weights(2, 2, 0, "triple")


def test_a_genuine_pair_has_its_persons_weight_once_and_products_do_not_overflow():
    weights = np.array([[3, 20, 30], [0, 1, 2]], np.uint8)
    found = uncertainty.pair_weights(weights, [0, 1, 1, 2], [0, 1, 2, 0])
    np.testing.assert_array_equal(found, [[3, 20, 600, 90], [0, 1, 2, 0]])


@pytest.mark.parametrize("seed", range(3))
def test_the_band_is_that_of_lists_with_pairs_repeated_by_weight(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 15, (2, 120))
    scores, same = rng.normal(size=120).round(1) + 2 * (a == b), a == b
    fars, draws = [0.05, 0.2, 0.5], 60
    tars = []
    index = np.unique(np.concatenate([a, b]), return_inverse=True)[1]
    for w in uncertainty.vertex_weights(index.max() + 1, draws, seed, "double"):
        times = np.where(same, w[index[:120]], w[index[:120]] * w[index[120:]]).astype(int)
        s, y = np.repeat(scores, times), np.repeat(same, times)
        if y.any() and not y.all():
            tars.append([metrics.matched_tar(s, y, far).tar for far in fars])
    expected = np.quantile(tars, [0.025, 0.975], axis=0)
    found = uncertainty.roc_band(scores, same, a, b, fars, draws=draws, seed=seed)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_effective_numbers():
    assert uncertainty.effective_number([3, 3, 3]) == pytest.approx(3)
    assert uncertainty.effective_number([1, 0, 0]) == 1


def test_a_rate_without_variance_is_as_uncertain_as_there_are_people():
    people = np.arange(40) % 8
    low, high = uncertainty.rate_interval(1.0, np.zeros(40), people, people)
    assert (low, high) == metrics.wilson(1.0, 8)


def test_a_stricter_threshold_costs_tar_so_accepted_impostors_count_against_it():
    scores = np.array([9.0, 7.0, 5.0, 3.0, 8.0, 6.0, 4.0, 2.0, 1.0, 0.0])
    same = np.arange(10) < 4
    influence = uncertainty.matched_tar_influence(scores, same, 0.34)
    accepted = scores >= metrics.threshold_at_far(scores, same, 0.34)
    assert (influence[same & accepted] > 0).all()
    assert (influence[~same & accepted] < 0).all()
    assert (influence[~same & ~accepted] > 0).all()


def test_weights_of_pairs_do_not_wrap_around_as_bytes_would():
    assert uncertainty.pair_weights(np.array([[20, 30]], np.uint8), [0, 0], [0, 1]).tolist() == [[20.0, 600.0]]


def test_mcnemar_counts_both_sides():
    assert uncertainty.mcnemar([1, 1, 0, 0, 0], [0, 1, 1, 1, 0]) == uncertainty.McNemar(
        only_first=1, only_second=2, p=1.0
    )


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_variance_from_elsewhere_widens_an_interval_at_the_edge_too(right):
    a, b = np.arange(40), np.arange(40) + 100
    correct, z = np.full(40, right), NormalDist().inv_cdf(0.975)
    for of in (
        lambda extra: (lambda i: (i.low, i.high))(dyadic_interval(correct, a, b, extra=extra)),
        lambda extra: uncertainty.rate_interval(right, correct - right, a, b, extra=extra),
    ):
        plain, wide = of(0.0), of(0.0025)
        far = 0 if right else 1  # the limit that is not at the edge
        assert plain[1 - far] == pytest.approx(right)
        assert wide[1 - far] == pytest.approx(right)
        assert abs(wide[far] - right) == pytest.approx(math.hypot(plain[far] - right, 0.05 * z))

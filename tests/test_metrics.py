import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn import metrics as sklearn_metrics
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import roc_auc_score, roc_curve

from faceembed import metrics


def labelled(seed, n, distinct):
    """Scores with many ties, both classes present."""
    rng = np.random.default_rng(seed)
    same = rng.random(n) < rng.uniform(0.2, 0.8)
    same[:2] = True, False
    return rng.integers(0, distinct, n) / 8 + same * rng.integers(0, 2), same


lists = given(seed=st.integers(0, 2**31 - 1), n=st.integers(2, 60), distinct=st.integers(1, 30))
quick = settings(deadline=None, max_examples=60)


@quick
@lists
def test_roc_and_auc_agree_with_scikit_learn(seed, n, distinct):
    scores, same = labelled(seed, n, distinct)
    far, tar, threshold = roc_curve(same, scores, drop_intermediate=False)
    curve = metrics.roc(scores, same)
    np.testing.assert_array_equal(curve.far, far)
    np.testing.assert_array_equal(curve.tar, tar)
    np.testing.assert_array_equal(curve.threshold, threshold)
    assert metrics.auc(scores, same) == pytest.approx(roc_auc_score(same, scores), abs=1e-12)


@quick
@lists
def test_auc_is_the_share_of_ordered_pairs_with_ties_counting_half(seed, n, distinct):
    scores, same = labelled(seed, n, distinct)
    wins = [(g > i) + (g == i) / 2 for g, i in itertools.product(scores[same], scores[~same])]
    assert metrics.auc(scores, same) == pytest.approx(np.mean(wins), abs=1e-12)


def hull_eer_by_definition(scores, same):
    """The least t with (FAR, FNMR) <= (t, t) for some mixture of two thresholds, over every couple of thresholds."""
    points = [(np.mean(scores[~same] >= t), np.mean(scores[same] < t)) for t in [*np.unique(scores), np.inf]]
    best = 1.0
    for (f0, m0), (f1, m1) in itertools.product(points, points):
        mixtures = [0.0, 1.0]
        if (f0 - m0) * (f1 - m1) < 0:
            mixtures.append((m0 - f0) / ((m0 - f0) - (m1 - f1)))
        best = min(best, *(max(f0 + w * (f1 - f0), m0 + w * (m1 - m0)) for w in mixtures))
    return best


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31 - 1), n=st.integers(2, 25), distinct=st.integers(1, 12))
def test_eer_is_the_best_equal_error_of_two_mixed_thresholds(seed, n, distinct):
    scores, same = labelled(seed, n, distinct)
    assert metrics.eer(scores, same) == pytest.approx(hull_eer_by_definition(scores, same), abs=1e-12)


@pytest.mark.parametrize(
    ("genuine", "impostor", "expected"),
    [
        ([3, 2], [1, 0], 0.0),
        ([1, 0], [3, 2], 0.5),  # backwards: the hull is the diagonal
        ([1, 1], [1, 1], 0.5),
        ([4, 2], [3, 1], 0.25),
        ([3, 3, 1], [3, 1, 1], 1 / 3),
        ([5, 4, 3, 1], [2], 0.2),  # the hull's edge from (0, 3/4) to (1, 1): FAR = 1 - TAR = 1/5
    ],
)
def test_eer_of_small_lists_worked_out_by_hand(genuine, impostor, expected):
    scores = np.array(genuine + impostor, float)
    assert metrics.eer(scores, np.arange(len(scores)) < len(genuine)) == pytest.approx(expected, abs=1e-15)


@quick
@lists
def test_accuracy_threshold_is_the_best_cut_and_the_highest_of_the_best(seed, n, distinct):
    scores, same = labelled(seed, n, distinct)
    threshold, reported = metrics.accuracy_threshold(scores, same)
    cuts = np.append(np.unique(scores), np.inf)
    share = np.array([np.mean((scores >= cut) == same) for cut in cuts])
    assert reported == share.max() == metrics.accuracy(scores, same, threshold)
    highest = cuts[np.flatnonzero(share == share.max())[-1]]
    np.testing.assert_array_equal(scores >= threshold, scores >= highest)
    assert math.isfinite(threshold)


def test_accuracy_threshold_takes_the_middle_of_the_gap_and_the_higher_of_two_equals():
    # Cuts above 4 and above 2 are both right three times in four: (4 | 3 2 1) and (4 3 2 | 1).
    assert metrics.accuracy_threshold([4, 3, 2, 1], [True, False, True, False]) == (3.5, 0.75)
    assert metrics.accuracy_threshold([1, 2], [True, True]) == (1.0, 1.0)
    threshold, share = metrics.accuracy_threshold([1, 2], [False, False])
    assert share == 1.0
    assert threshold == np.nextafter(2.0, np.inf)


def test_a_threshold_between_neighbouring_floats_still_separates_them():
    below = 1.0
    above = np.nextafter(below, 2)
    threshold, share = metrics.accuracy_threshold([above, below], [True, False])
    assert share == 1.0
    assert below < threshold <= above


@quick
@given(
    seed=st.integers(0, 2**31 - 1),
    n=st.integers(2, 60),
    distinct=st.integers(1, 30),
    far=st.sampled_from([0.01, 0.1, 0.2, 0.25, 0.29, 0.3, 0.5, 0.7, 0.99]),
)
def test_threshold_at_far_keeps_the_far_and_cannot_be_lower(seed, n, distinct, far):
    scores, same = labelled(seed, n, distinct)
    threshold = metrics.threshold_at_far(scores, same, far)
    impostor = scores[~same]
    assert np.mean(impostor >= threshold) <= far
    assert np.mean(impostor >= np.nextafter(threshold, -np.inf)) > far


def test_threshold_at_far_counts_in_integers_where_the_product_rounds_down():
    scores = np.arange(101.0)
    same = scores == 100
    accepted = [int(np.sum(scores[:100] >= metrics.threshold_at_far(scores, same, k / 100))) for k in range(1, 100)]
    assert accepted == list(range(1, 100))
    # The other way round: 0.45999999999999996 * 50 is 23.0, yet 23 of 50 are more than was asked for.
    far = np.nextafter(0.46, 0)
    threshold = metrics.threshold_at_far(np.arange(50), np.zeros(50), far)
    assert np.mean(np.arange(50) >= threshold) == 0.44


def test_tied_impostors_are_refused_together():
    threshold = metrics.threshold_at_far([9, 5, 5, 5, 1], [True, False, False, False, False], 0.5)
    assert metrics.rates_at([9, 5, 5, 5, 1], [True, False, False, False, False], threshold) == (1.0, 0.0)


def test_tar_at_far_sets_its_threshold_on_training_pairs_and_reports_the_realised_far():
    train = np.array([9.0, 8, 4, 3, 2, 1])
    train_same = np.array([True, True, False, False, False, False])
    tested = np.array([9.0, 3.5, 6, 5, 2.5, 1])
    same = np.array([True, True, False, False, False, False])
    point = metrics.tar_at_far(train, train_same, tested, same, far=0.25)
    # One training impostor of four may pass: 4 does, so the threshold is just above 3; on the test 6 and 5 pass too.
    assert point.threshold == np.nextafter(3.0, np.inf)
    assert (point.tar, point.far) == (1.0, 0.5)
    assert (point.n_genuine, point.n_impostor, point.n_impostor_train) == (2, 4, 4)


def test_an_operating_point_is_resolved_by_the_poorer_of_training_and_test():
    point = {"target": 0.1, "threshold": 0.0, "tar": 1.0, "far": 0.1, "n_genuine": 9}
    assert metrics.OperatingPoint(**point, n_impostor=300, n_impostor_train=300).resolution.status == "printed"
    assert metrics.OperatingPoint(**point, n_impostor=299, n_impostor_train=300).resolution.status == "flagged"
    assert metrics.OperatingPoint(**point, n_impostor=300, n_impostor_train=99).resolution.status == "unresolvable"


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.01, 0.001, 1e-4, 1 / 3])
def test_resolvability_changes_at_ten_and_at_thirty_expected_events(rate):
    ten, thirty = math.ceil(round(10 / rate, 6)), math.ceil(round(30 / rate, 6))
    status = [metrics.resolvable(rate, n).status for n in (ten - 1, ten, thirty - 1, thirty)]
    assert status == ["unresolvable", "flagged", "flagged", "printed"]
    assert metrics.resolvable(rate, 1).needs == thirty
    assert [bool(metrics.resolvable(rate, n)) for n in (ten - 1, ten, thirty)] == [False, True, True]


def test_resolvability_is_not_moved_by_a_quotient_that_rounds_up():
    assert 30 / 0.0003 > 100_000
    assert metrics.resolvable(0.0003, 100_000) == metrics.Resolution("printed", 100_000)


def test_no_errors_give_three_over_n_which_a_95_percent_bound_confirms():
    assert metrics.zero_error_bound(3000) == 0.001
    assert metrics.zero_error_bound(2) == 1.0
    assert (1 - metrics.zero_error_bound(3000)) ** 3000 == pytest.approx(0.05, abs=0.001)


def test_wilson_matches_published_values_and_inverts_the_score_test():
    # Newcombe (1998), table I: 81/263 and 0/20, score method without continuity correction.
    assert metrics.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert metrics.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert metrics.wilson(1, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)
    for limit in metrics.wilson(0.3, 57, level=0.9):
        assert abs(0.3 - limit) / math.sqrt(limit * (1 - limit) / 57) == pytest.approx(1.6448536269514722)


def test_cllr_by_hand_and_at_its_landmarks():
    assert metrics.cllr([0, 0, 0], [True, False, False]) == 1.0
    assert metrics.cllr([800, -800], [True, False]) == 0.0
    assert metrics.cllr([math.log(3), math.log(1 / 3), 0], [True, False, False]) == pytest.approx(
        (math.log2(4 / 3) + (math.log2(4 / 3) + 1) / 2) / 2
    )


@quick
@given(
    seed=st.integers(0, 2**31 - 1),
    n=st.integers(2, 60),
    distinct=st.integers(1, 30),
    rising=st.sampled_from([lambda s: 3 * s - 7, np.exp, np.arctan, lambda s: s**3]),
)
def test_rank_metrics_ignore_monotone_maps_and_order(seed, n, distinct, rising):
    scores, same = labelled(seed, n, distinct)
    order = np.random.default_rng(seed + 1).permutation(n)
    mapped = rising(scores - scores.mean())
    assert len(np.unique(mapped)) == len(np.unique(scores))
    for changed, labels in ((mapped, same), (scores[order], same[order])):
        assert metrics.auc(changed, labels) == metrics.auc(scores, same)
        assert metrics.eer(changed, labels) == metrics.eer(scores, same)
        assert metrics.accuracy_threshold(changed, labels)[1] == metrics.accuracy_threshold(scores, same)[1]
        points = [metrics.tar_at_far(s, y, s, y, far=0.3) for s, y in ((changed, labels), (scores, same))]
        assert (points[0].tar, points[0].far) == (points[1].tar, points[1].far)


@quick
@lists
def test_changing_sign_and_sides_reflects_the_roc(seed, n, distinct):
    scores, same = labelled(seed, n, distinct)
    assert metrics.auc(-scores, ~same) == pytest.approx(metrics.auc(scores, same), abs=1e-12)
    assert metrics.eer(-scores, ~same) == pytest.approx(metrics.eer(scores, same), abs=1e-12)
    assert metrics.auc(-scores, same) == pytest.approx(1 - metrics.auc(scores, same), abs=1e-12)


def test_a_fold_wise_threshold_is_applied_pair_by_pair():
    # A score equal to its threshold is accepted.
    assert metrics.rates_at([1, 1, 1, 1], [True, True, False, False], [1, 2, 0, 1]) == (0.5, 1.0)
    assert metrics.accuracy([1, 1, 1, 1], [True, True, False, False], [1, 2, 0, 1]) == 0.25


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.roc([1, math.nan, math.inf], [True, False, True]), r"2 scores are not finite.*rows \[1, 2\]"),
        (lambda: metrics.auc([1, 2], [True, True]), "2 pairs, all genuine"),
        (lambda: metrics.eer([1, 2], [False, False]), "2 pairs, all impostor"),
        (lambda: metrics.roc([], []), "no pairs"),
        (lambda: metrics.roc([1, 2, 3], [True, False]), "3 scores for 2 labels"),
        (lambda: metrics.roc([[1], [2]], [True, False]), "one-dimensional"),
        (lambda: metrics.roc([1, 2], [1, 2]), r"same holds \[1, 2\]"),
        (lambda: metrics.accuracy_threshold([], []), "no pairs"),
        (lambda: metrics.accuracy([], [], 0.5), "no pairs"),
        (lambda: metrics.threshold_at_far([1, 2], [True, True], 0.1), "no impostor pairs"),
        (lambda: metrics.threshold_at_far([1, 2], [True, False], 0), "far is 0"),
        (lambda: metrics.threshold_at_far([1, 2], [True, False], 1.0), "far is 1.0"),
        (lambda: metrics.rates_at([1, 2], [True, False], math.nan), "threshold is NaN"),
        (lambda: metrics.rates_at([1, 2], [True, False], [1, 2, 3]), r"thresholds \(3,\) for 2 scores"),
        (lambda: metrics.wilson(1.2, 5), "rate is 1.2"),
        (lambda: metrics.wilson(0.5, 0), "n is 0"),
        (lambda: metrics.wilson(0.5, 5, level=95), "level is 95"),
        (lambda: metrics.resolvable(0, 5), "rate is 0"),
        (lambda: metrics.resolvable(0.1, -1), "n is -1"),
        (lambda: metrics.zero_error_bound(0), "n is 0"),
    ],
)
def test_unusable_input_is_refused_with_what_was_found(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- DET, calibration ----------------------------------------------------------------------------------------------------


def drawn(seed, n=60, ties=True):
    rng = np.random.default_rng(seed)
    same = rng.permutation(n) < n // 3
    scores = rng.normal(size=n) + 1.2 * same
    return (scores.round(1) if ties else scores), same


@pytest.mark.parametrize("seed", range(5))
def test_det_is_scikit_learns(seed):
    scores, same = drawn(seed)
    found = metrics.det(scores, same)
    fmr, fnmr, threshold = sklearn_metrics.det_curve(same, scores, drop_intermediate=False)
    # Theirs begins at the lowest score and keeps one point with no miss, and one with no false match.
    inside = np.isin(found.threshold, threshold)
    np.testing.assert_allclose(found.fmr[inside][::-1], fmr[np.isin(threshold, found.threshold)], atol=1e-15)
    np.testing.assert_allclose(found.fnmr[inside][::-1], fnmr[np.isin(threshold, found.threshold)], atol=1e-15)
    assert inside.sum() > 5
    np.testing.assert_allclose(found.x[1:-1], norm.ppf(found.fmr[1:-1]), atol=1e-12)
    assert (found.x[0], found.y[0], found.x[-1], found.y[-1]) == (-np.inf, np.inf, np.inf, -np.inf)


def isotonic_cllr(scores, same):
    """Cllr of scikit-learn's isotonic posteriors, their prior odds taken off."""
    p = IsotonicRegression(y_min=0, y_max=1).fit(scores, same).predict(scores)
    with np.errstate(divide="ignore"):
        llr = np.log(p) - np.log1p(-p) - np.log(same.sum() / (~same).sum())
    return (np.logaddexp(0, -llr[same]).mean() + np.logaddexp(0, llr[~same]).mean()) / (2 * np.log(2))


@settings(deadline=None)
@given(seed=st.integers(0, 2**31 - 1), n=st.integers(4, 60), ties=st.booleans())
def test_pav_is_scikit_learns_isotonic_regression_and_no_monotone_calibration_costs_less(seed, n, ties):
    scores, same = drawn(seed, n, ties)
    if not same.any():
        return
    llr = metrics.pav_llr(scores, same)
    assert metrics.min_cllr(scores, same) == pytest.approx(isotonic_cllr(scores, same), abs=1e-9)
    order = np.argsort(scores, kind="stable")
    assert (llr[order][1:] >= llr[order][:-1]).all()
    assert len({(s, v) for s, v in zip(scores, llr, strict=True)}) == len(set(scores))  # ties stay ties
    for slope, offset in ((1.0, 0.0), (0.5, 0.3), (3.0, -1.0)):
        assert metrics.min_cllr(scores, same) <= metrics.cllr(slope * scores + offset, same) + 1e-12
    assert metrics.min_cllr(np.exp(scores / 3), same) == pytest.approx(metrics.min_cllr(scores, same), abs=1e-12)
    assert 0 <= metrics.min_cllr(scores, same) <= 1 + 1e-12


def test_min_cllr_by_hand():
    # Blocks of odds 0 (one impostor), 1 : 1, infinity (one genuine): half of each kind costs one bit.
    assert metrics.min_cllr([4, 3, 2, 1], [True, False, True, False]) == pytest.approx(0.5)
    assert metrics.min_cllr([2, 1], [True, False]) == 0
    assert metrics.min_cllr([1, 2], [True, False]) == 1
    assert metrics.min_cllr([1, 1, 1], [True, False, False]) == 1
    llr = metrics.pav_llr([1, 1, 1, 0, 0, 0], [True, True, False, True, False, False])
    np.testing.assert_allclose(llr, np.log([2, 2, 2, 0.5, 0.5, 0.5]))


def test_brier_by_hand_and_by_loop():
    llr, same = np.array([np.log(3), 0.0, -np.log(4), 0.0]), np.array([True, True, False, False])
    # Posteriors at 1/2: 3/4, 1/2, 1/5, 1/2.
    expected = 0.5 * ((1 / 16 + 1 / 4) / 2) + 0.5 * ((1 / 25 + 1 / 4) / 2)
    assert metrics.brier(llr, same, prior=0.5) == pytest.approx(expected)
    # At 1/4 genuine: odds 1, 1/3, 1/12, 1/3.
    p = np.array([1 / 2, 1 / 4, 1 / 13, 1 / 4])
    expected = 0.25 * ((1 - p[:2]) ** 2).mean() + 0.75 * (p[2:] ** 2).mean()
    assert metrics.brier(llr, same, prior=0.25) == pytest.approx(expected)
    assert metrics.brier([0, 0, 0], [True, False, False], prior=0.1) == pytest.approx(0.09)
    assert metrics.brier([800.0, -800.0], [True, False], prior=0.5) == 0
    assert metrics.brier([-800.0, 800.0], [True, False], prior=0.5) == 1


@settings(deadline=None)
@given(seed=st.integers(0, 2**31 - 1), n=st.integers(4, 80), bins=st.integers(1, 12), prior=st.floats(0.05, 0.95))
def test_reliability_bins_everybody_once_and_keeps_ties_together(seed, n, bins, prior):
    scores, same = drawn(seed, n)
    if not same.any():
        return
    found = metrics.reliability(scores, same, prior=prior, bins=bins)
    assert (found.n_genuine.sum(), found.n_impostor.sum()) == (same.sum(), (~same).sum())
    assert found.weight.sum() == pytest.approx(1)
    assert found.weight @ found.observed == pytest.approx(prior)
    assert (np.diff(found.predicted) > 0).all()
    assert len(found.weight) <= bins
    p = 1 / (1 + (1 - prior) / prior * np.exp(-scores))
    assert found.weight @ found.predicted == pytest.approx(prior * p[same].mean() + (1 - prior) * p[~same].mean())
    gap = metrics.ece(scores, same, prior=prior, bins=bins)
    assert gap == pytest.approx(found.weight @ np.abs(found.observed - found.predicted))
    # Bins of a sorted list: the loop cuts where the middle of a value's pairs passes a quantile.
    values = np.unique(scores)
    middles = [((scores < v).sum() + (scores == v).sum() / 2) * bins / n for v in values]
    assert len(found.weight) == len({int(m) for m in middles})


def test_ece_is_small_where_ratios_are_what_they_say_and_large_where_they_boast():
    rng = np.random.default_rng(0)
    same = rng.random(40_000) < 0.5
    llr = 2.0 * (rng.normal(size=40_000) + np.where(same, 1.0, -1.0))  # exact: unit normals two apart
    assert metrics.ece(llr, same, prior=0.5) < 0.01
    assert metrics.ece(3 * llr, same, prior=0.5) > 0.05
    assert metrics.cllr(llr, same) == pytest.approx(metrics.min_cllr(llr, same), abs=0.01)


def test_matched_tar_sets_its_threshold_on_the_same_pairs():
    scores, same = drawn(3, 300, ties=False)
    point = metrics.matched_tar(scores, same, 0.1)
    assert point.threshold == metrics.threshold_at_far(scores, same, 0.1)
    assert (point.tar, point.far) == metrics.rates_at(scores, same, point.threshold)
    assert point.far <= 0.1
    assert metrics.matched_tar(np.exp(scores), same, 0.1).tar == point.tar


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.brier([0.0, 1.0], [True, False], prior=1.0), "prior is 1.0"),
        (lambda: metrics.reliability([0.0, 1.0], [True, False], prior=0.5, bins=0), "bins is 0"),
        (lambda: metrics.ece([0.0, np.nan], [True, False], prior=0.5), "1 scores are not finite"),
        (lambda: metrics.pav_llr([0.0, 1.0], [True, True]), "all genuine"),
    ],
)
def test_calibration_refuses_what_it_cannot_say(call, message):
    with pytest.raises(ValueError, match=message):
        call()

import itertools
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faceembed import metrics
from faceembed.uncertainty import dyadic_interval, dyadic_variance, wilson_interval


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
    assert dyadic.n_effective == pytest.approx(50)
    assert (dyadic.low, dyadic.high) == pytest.approx(metrics.wilson(0.8, 50))
    plain = wilson_interval(correct)
    assert (plain.low, plain.high) == metrics.wilson(0.8, 50)


def test_each_pair_ten_times_counts_once():
    correct = np.repeat(np.arange(40) % 4 > 0, 10)
    a, b = np.repeat(np.arange(40), 10), np.repeat(np.arange(40) + 40, 10)
    assert dyadic_interval(correct, a, b).n_effective == pytest.approx(40)


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

"""The learned heads against scikit-learn, against algebra, and against what they must find."""

import math

import numpy as np
import pytest
from scipy.special import expit
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from faceembed import metrics
from faceembed.verification import HEADS, EmbeddedPairs, Head, compare, fit, heads
from faceembed.verification.features import FEATURES, chi_square, chi_square_halves
from tests.test_verification import faces, parts, spoil


def planted(seed, *, n=3000, d=8, tell=2, prefix="p"):
    """Pairs of n people each of whom comes once a side, whose first `tell` components alone say who they are."""
    rng = np.random.default_rng(seed)
    same = np.arange(n) % 2 == 0
    who = rng.normal(size=(2 * n, d))
    a, b = who[:n], np.where(same[:, None], who[:n], who[n:])
    spread = np.where(np.arange(d) < tell, 0.5, 3.0)
    names = np.array([f"{prefix}{i}" for i in range(2 * n)])
    return EmbeddedPairs(
        a + spread * rng.normal(size=(n, d)),
        b + spread * rng.normal(size=(n, d)),
        same,
        names[:n],
        np.where(same, names[:n], names[n:]),
    )


def standardised(x):
    return (x - x.mean(axis=0)) / x.std(axis=0)


@pytest.mark.parametrize("name", HEADS)
def test_cross_scores_are_the_scores_of_every_row_with_every_row(name):
    head = HEADS[name](faces(0))
    a, b = faces(1).a[:7], faces(2).b[:5]
    expected = [[head.score(x[None], y[None])[0] for y in b] for x in a]
    np.testing.assert_allclose(head.cross_scores(a, b), expected, rtol=0, atol=1e-11)


def test_features_by_hand():
    a, b = np.array([[1.0, -2.0, 0.0]]), np.array([[3.0, 2.0, 0.0]])
    expected = {
        "abs_difference": [2, 4, 0],
        "abs_difference_and_dot": [2, 4, 0, -1],
        "chi_square_halves": [1, 2, 0, 0, 2, 0],
        "cosine": [-1 / math.sqrt(5 * 13)],
        "product": [3, -4, 0],
        "squared_difference": [4, 16, 0],
        "squared_distance": [20],
    }
    for name, row in expected.items():
        np.testing.assert_allclose(FEATURES[name](a, b), [row], rtol=1e-15)
    np.testing.assert_allclose(chi_square(np.abs(a), np.abs(b)), [[1, 0, 0]])
    assert FEATURES.keys() == {*expected, "chi_square"}


def test_chi_square_refuses_signed_numbers_and_its_head_takes_them_by_halves():
    signed = faces(0)
    with pytest.raises(ValueError, match="a \\+ b crosses zero"):
        chi_square(signed.a, signed.b)
    # What the refusal is about: opposite signs and nearly equal sizes give a feature of any size and either sign.
    a, b = np.array([0.5]), np.array([-0.4999, -0.5001])
    assert (np.square(a - b) / (a + b)).round(-3).tolist() == [10000, -10000]
    assert HEADS["logistic_chi2"](signed).feature == HEADS["chi2_svm"](signed).feature == "chi_square_halves"
    positive = EmbeddedPairs(np.abs(signed.a), np.abs(signed.b), signed.same)
    assert HEADS["logistic_chi2"](positive).feature == "chi_square"
    np.testing.assert_array_equal(chi_square_halves(positive.a, positive.b)[:, :8], chi_square(positive.a, positive.b))
    assert not chi_square_halves(positive.a, positive.b)[:, 8:].any()


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("logistic_square", "squared_difference"),
        ("logistic_product", "product"),
        ("logistic_abs_dot", "abs_difference_and_dot"),
        ("logistic_chi2", "chi_square_halves"),
    ],
)
def test_l2_heads_equal_scikit_learn(name, feature):
    train, test = faces(0, genuine=0.3), faces(1)
    head = HEADS[name](train)
    x, y = (FEATURES[feature](p.a, p.b) for p in (train, test))
    plain = LogisticRegression(C=head.regularisation, tol=1e-8, max_iter=10_000).fit(standardised(x), train.same)
    prior = math.log(0.3 / 0.7)
    expected = plain.decision_function((y - x.mean(axis=0)) / x.std(axis=0)) - prior
    np.testing.assert_allclose(head.score(test.a, test.b), expected, atol=0.01)
    assert head.threshold == pytest.approx(-prior)


def test_l1_drops_the_components_that_do_not_tell():
    train = planted(0)
    sparse, dense = (HEADS[name](train, 0.01) for name in ("logistic_abs_l1", "logistic_abs"))
    assert np.flatnonzero(sparse.weight).tolist() == [0, 1]
    assert np.count_nonzero(dense.weight) == 8
    x = np.abs(train.a - train.b)
    oracle = LogisticRegression(C=sparse.regularisation, l1_ratio=1, solver="saga", tol=1e-8, max_iter=20_000)
    oracle.fit(standardised(x), train.same)
    np.testing.assert_allclose(np.array(sparse.weight) * x.std(axis=0), oracle.coef_[0], atol=2e-3)


def test_nonpositive_is_the_same_optimum_where_no_weight_would_be_positive():
    train = planted(1, d=3, tell=3)
    free, bound = (HEADS[name](train, 0.1) for name in ("logistic_abs", "logistic_abs_nonpositive"))
    assert max(free.weight) < 0
    np.testing.assert_allclose(bound.weight, free.weight, rtol=2e-3)
    assert bound.intercept == pytest.approx(free.intercept, rel=2e-3)


@pytest.mark.parametrize("c", [0.001, 1.0])
def test_nonpositive_meets_its_optimality_conditions(c):
    """At the constrained optimum the gradient vanishes in free components and points outwards at the bound."""
    train = planted(2, n=400, tell=1)
    head = HEADS["logistic_abs_nonpositive"](train, c)
    x = standardised(np.abs(train.a - train.b))
    w = np.array(head.weight) * np.abs(train.a - train.b).std(axis=0)
    prior = math.log(train.same.mean() / (1 - train.same.mean()))
    residual = expit(head.score(train.a, train.b) + prior) - train.same
    gradient = (c * x.T @ residual + w) / (c * len(x))
    at_bound = w == 0
    assert (w <= 0).all()
    assert at_bound.any()
    assert not at_bound.all()
    np.testing.assert_allclose(gradient[~at_bound], 0, atol=1e-5)
    assert (gradient[at_bound] <= 1e-5).all()
    assert abs(residual.mean()) < 1e-5


def test_svm_orders_pairs_by_its_margin_and_is_calibrated_on_pairs_it_did_not_see():
    train, test = planted(11), planted(12, prefix="q")
    head = HEADS["chi2_svm"](train)
    x, y = (chi_square_halves(p.a, p.b) for p in (train, test))
    svm = LinearSVC(C=head.regularisation, dual=False, intercept_scaling=100, tol=1e-6).fit(standardised(x), train.same)
    margin = svm.decision_function((y - x.mean(axis=0)) / x.std(axis=0))
    scores = head.score(test.a, test.b)
    assert np.corrcoef(margin, scores)[0, 1] > 0.9999
    # A margin of 1 is no likelihood ratio of e: the calibrated scores cost less than the margins, and near the least.
    assert metrics.cllr(scores, test.same) < metrics.cllr(margin, test.same)
    assert metrics.cllr(scores, test.same) < metrics.min_cllr(scores, test.same) + 0.03


def test_svm_calibration_is_not_fooled_by_features_that_separate_the_training_pairs():
    """With as many features as pairs the in-sample margins part the classes; held-out ones say how little they know."""
    train, test = planted(3, n=120, d=60, tell=1), planted(4, n=2000, d=60, tell=1, prefix="q")
    scores = HEADS["chi2_svm"](train, 10.0).score(test.a, test.b)
    assert metrics.cllr(scores, test.same) < 1.05


def test_whitening_is_the_mahalanobis_distance_of_genuine_differences():
    train, test = planted(5), planted(6, prefix="q")
    head = HEADS["whitened_distance"](train)
    covariance = ledoit_wolf((train.a - train.b)[train.same], assume_centered=True)[0]
    precision = np.linalg.inv(covariance)
    delta = test.a - test.b
    distance = np.einsum("nd,de,ne->n", delta, precision, delta)
    assert np.corrcoef(distance, head.score(test.a, test.b))[0, 1] < -0.9999
    plain = HEADS["threshold"](train)
    whitened, raw = (metrics.auc(h.score(test.a, test.b), test.same) for h in (head, plain))
    assert whitened > raw + 0.05
    one = np.ones((4, 2))
    with pytest.raises(ValueError, match="nothing to whiten"):
        fit("whitened_distance", one, one * [[1], [1], [2], [3]], [1, 1, 0, 0])


@pytest.mark.parametrize("name", [name for name in HEADS if name not in ("threshold", "threshold_cosine")])
def test_scores_are_log_likelihood_ratios_whatever_the_training_prior(name):
    test = planted(8, prefix="q")
    for seed, keep in ((7, 1.0), (9, 0.25)):
        pairs = planted(seed)
        rare = pairs.take(~pairs.same | (np.arange(len(pairs)) < keep * len(pairs)))
        scores = HEADS[name](rare).score(test.a, test.b)
        # Calibrated: in bins of the score, the observed log odds at equal priors are the score.
        assert metrics.cllr(scores, test.same) < metrics.min_cllr(scores, test.same) + 0.05


def test_cosine_and_distance_decide_alike_on_unit_vectors_and_not_on_others():
    train, test = faces(0, prefix="t"), faces(1)
    results = compare(*parts(test), train=train, heads=["threshold", "threshold_cosine"])
    one, other = (results[name].scores >= results[name].cuts for name in results)
    np.testing.assert_array_equal(one, other)
    long = np.linspace(1, 9, len(test))[:, None]
    one, other = (fit(name, *parts(train)) for name in results)
    assert (one.score(long * test.a, test.b) != one.score(test.a, test.b)).any()
    np.testing.assert_allclose(other.score(long * test.a, test.b), other.score(test.a, test.b))


def test_a_head_at_a_layer_reads_that_layer_alone():
    main, layer = faces(0, prefix="t"), planted(10, n=240)
    layer = EmbeddedPairs(layer.a, layer.b, main.same)
    pairs = EmbeddedPairs(*parts(main), layers={"deep": (layer.a, layer.b)})
    results = compare(*parts(pairs), train=pairs, heads=["logistic_abs", "logistic_abs@deep"], layers=pairs.layers,
                      allow_shared=True)  # fmt: skip
    at = results["logistic_abs@deep"].fitted[0]
    assert (at.name, at.layer) == ("logistic_abs@deep", "deep")
    assert Head.from_dict(at.to_dict()) == at
    inner = EmbeddedPairs(layer.a, layer.b, main.same, main.people_a, main.people_b)
    np.testing.assert_array_equal(results["logistic_abs@deep"].scores, HEADS["logistic_abs"](inner)._score(inner))
    assert (results["logistic_abs"].scores != results["logistic_abs@deep"].scores).all()
    assert heads.layers_of(results) == ("deep",)
    with pytest.raises(ValueError, match="no layer 'shallow' among the features given: deep"):
        compare(*parts(pairs), train=pairs, heads=["logistic_abs@shallow"], layers=pairs.layers)
    with pytest.raises(ValueError, match="1 rows of a@deep are not finite"):
        EmbeddedPairs(*parts(main), layers={"deep": (spoil(layer.a, [2], np.nan), layer.b)})


def test_a_damaged_projection_is_refused():
    fields = HEADS["whitened_distance"](faces(0)).to_dict()
    with pytest.raises(ValueError, match="projection does not take 8 numbers"):
        Head.from_dict(fields | {"projection": fields["projection"][:5]})
    with pytest.raises(ValueError, match="not finite"):
        Head.from_dict(fields | {"projection": [["nan"] * 8] * 8})


def test_a_given_regularisation_is_used():
    train = faces(0)
    for name in ("logistic_abs", "logistic_abs_l1", "logistic_abs_nonpositive", "chi2_svm"):
        assert HEADS[name](train, 0.5).regularisation == 0.5
        assert heads.fit_pairs(name, train).note == "chosen by Cllr over 5 folds of people"

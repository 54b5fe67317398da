import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from faceembed import metrics, report, uncertainty
from faceembed.verification import HEADS, EmbeddedPairs, Head, compare, fit, protocols
from faceembed.verification import heads as heads_module

QUICK_HEADS = ("threshold", "logistic_distance")


def faces(seed, *, people=60, n=240, d=8, noise=0.6, genuine=0.5, prefix="p"):
    """Unit embeddings of n pairs in random order, as EmbeddedPairs."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(people, d))
    a = rng.integers(0, people, n)
    same = rng.permutation(n) < round(genuine * n)
    b = np.where(same, a, (a + rng.integers(1, people, n)) % people)
    names = np.array([f"{prefix}{i:03d}" for i in range(people)])

    def embed(who):
        x = centre[who] + noise * rng.normal(size=(n, d))
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    return EmbeddedPairs(embed(a), embed(b), same, names[a], names[b])


def parts(pairs, *, people=True):
    everything = pairs.a, pairs.b, pairs.same, pairs.people_a, pairs.people_b
    return everything if people else everything[:3]


def swapped(pairs):
    return EmbeddedPairs(pairs.b, pairs.a, pairs.same, pairs.people_b, pairs.people_a)


def test_nothing_here_imports_jax():
    code = (
        "import sys, faceembed.metrics, faceembed.uncertainty, faceembed.report, faceembed.verification; "
        "from faceembed.verification import features, heads, protocols; "
        "print([m for m in ('jax', 'jaxlib', 'flax', 'tensorflow') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def spoil(array, rows, value):
    array = array.copy()
    array[rows] = value
    return array


GOOD = faces(0)


# Heads


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_symmetric_to_the_bit_in_fitting_and_scoring(name):
    train, test = faces(0), faces(1)
    head = HEADS[name](train)
    assert HEADS[name](swapped(train)) == head
    np.testing.assert_array_equal(head.score(test.a, test.b), head.score(test.b, test.a))


@pytest.mark.parametrize("name", HEADS)
def test_scores_do_not_depend_on_the_order_or_company_of_pairs(name):
    train, test = faces(0), faces(1)
    head = HEADS[name](train)
    order = np.random.default_rng(2).permutation(len(test))
    scores = head.score(test.a, test.b)
    np.testing.assert_allclose(head.score(test.a[order], test.b[order]), scores[order], rtol=0, atol=1e-12)
    np.testing.assert_allclose(head.score(test.a[:1], test.b[:1]), scores[:1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_comes_back_from_json_equal(name):
    head = HEADS[name](faces(0))
    assert Head.from_dict(json.loads(json.dumps(head.to_dict(), allow_nan=False))) == head


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": [1.0]}, "1 weights where 8 belong"),
        ({"feature": "magic"}, "'magic'"),
        ({"intercept": "nan"}, "not finite"),
        ({"surprise": 1}, r"unknown: \['surprise'\]"),
    ],
)
def test_a_damaged_head_is_refused(change, message):
    fields = fit("logistic_abs", *parts(faces(0))).to_dict()
    with pytest.raises(ValueError, match=message):
        Head.from_dict(fields | change)
    del fields["threshold"]
    with pytest.raises(ValueError, match=r"missing: \['threshold'\]"):
        Head.from_dict(fields)


def test_threshold_is_minus_the_squared_distance_cut_where_training_accuracy_is_best():
    train = faces(0)
    head = HEADS["threshold"](train)
    distance = ((train.a - train.b) ** 2).sum(axis=1)
    np.testing.assert_allclose(head.score(train.a, train.b), -distance, rtol=1e-12)
    assert head.threshold == metrics.accuracy_threshold(-distance, train.same)[0]


def test_logistic_heads_equal_scikit_learn_on_the_raw_features():
    train, test = faces(0, genuine=0.3), faces(1)
    prior = math.log(train.same.mean() / (1 - train.same.mean()))
    distance = lambda p: ((p.a - p.b) ** 2).sum(axis=1, keepdims=True)  # noqa: E731
    plain = LogisticRegression(C=1e6, tol=1e-8, max_iter=10_000).fit(distance(train), train.same)
    head = HEADS["logistic_distance"](train)
    np.testing.assert_allclose(head.score(test.a, test.b), plain.decision_function(distance(test)) - prior, atol=0.01)

    head = HEADS["logistic_abs"](train)
    x, y = np.abs(train.a - train.b), np.abs(test.a - test.b)
    mean, spread = x.mean(axis=0), x.std(axis=0)
    plain = LogisticRegression(C=head.regularisation, tol=1e-8, max_iter=10_000).fit((x - mean) / spread, train.same)
    np.testing.assert_allclose(
        head.score(test.a, test.b), plain.decision_function((y - mean) / spread) - prior, atol=0.01
    )


@pytest.mark.parametrize("name", ["logistic_distance", "logistic_abs"])
def test_log_likelihood_ratios_survive_another_prior_and_the_threshold_follows_the_training_prior(name):
    # A fifth of the training pairs is genuine, four fifths of the tested ones: the ratio must not know.
    train = faces(3, n=4000, people=400, genuine=0.2)
    test = faces(4, n=4000, people=400, genuine=0.8)
    head = HEADS[name](train)
    llr = head.score(test.a, test.b)
    for low, high in ((-2, -0.5), (-0.5, 0.5), (0.5, 2)):
        inside = (llr >= low) & (llr < high)
        observed = metrics.wilson(test.same[inside].mean(), inside.sum(), level=0.999)
        expected = np.mean(1 / (1 + np.exp(-llr[inside] - math.log(4))))
        assert observed[0] - 0.03 <= expected <= observed[1] + 0.03
    assert head.threshold == pytest.approx(math.log(4))
    assert abs(metrics.cllr(llr, test.same) - metrics.cllr(head.score(train.a, train.b), train.same)) < 0.03


def test_logistic_abs_learns_which_components_tell_and_the_distance_does_not():
    def noisy(seed):
        pairs = faces(seed, n=1200, people=300, noise=0.2)
        rng = np.random.default_rng(seed + 100)
        junk = [rng.normal(size=(1200, 8)) * 1.5 for _ in range(2)]
        return EmbeddedPairs(
            np.hstack([pairs.a, junk[0]]), np.hstack([pairs.b, junk[1]]), pairs.same, pairs.people_a, pairs.people_b
        )

    test = noisy(1)
    auc = {name: metrics.auc(HEADS[name](noisy(0)).score(test.a, test.b), test.same) for name in HEADS}
    assert auc["logistic_abs"] > 0.97
    assert auc["threshold"] < 0.85
    assert auc["logistic_distance"] == pytest.approx(auc["threshold"], abs=1e-9)


def test_regularisation_is_strong_where_the_features_are_noise_and_weak_where_they_tell():
    rng = np.random.default_rng(5)
    told = faces(6, n=1200, people=300, noise=0.2)
    noise = EmbeddedPairs(
        rng.normal(size=(1200, 8)), rng.normal(size=(1200, 8)), told.same, told.people_a, told.people_b
    )
    weak, strong = HEADS["logistic_abs"](told), HEADS["logistic_abs"](noise)
    assert strong.regularisation <= 0.01
    assert weak.regularisation >= 0.1
    assert "5 folds of people" in weak.note
    assert "people not given" in fit("logistic_abs", *parts(told, people=False)).note
    assert "too few" in fit("logistic_abs", told.a[:4], told.b[:4], [True, False, True, False]).note


def test_regularisation_is_chosen_on_people_whom_the_fit_did_not_see(monkeypatch):
    """Embeddings identify people, so pairs of known people flatter a weak penalty; folds by person do not."""
    sides = []
    original = protocols.splits

    def spy(pairs, fold, *, disjoint):
        for train, test in original(pairs, fold, disjoint=disjoint):
            sides.append((pairs.take(train), pairs.take(test)))
            yield train, test

    monkeypatch.setattr(heads_module.protocols, "splits", spy)
    HEADS["logistic_abs"](faces(7, people=40, n=300))
    assert len(sides) == 5
    assert sum(len(test) for _, test in sides) == 300
    for train, test in sides:
        assert len(train) > 20
        assert protocols.shared_people(train, test) == []


@pytest.mark.parametrize("seed", [6, 7])
def test_regularisation_is_the_one_of_least_pooled_cllr(seed):
    """Few genuine pairs, and another share of them in each fold's fit: their prior must not enter the choice."""
    train = faces(seed, n=150, people=60, d=12, noise={6: 1.5, 7: 0.8}[seed], genuine=0.15)
    x = np.abs(train.a - train.b)
    costs = []
    for c in heads_module.GRID:
        llr, labels = [], []
        for fitted, held in protocols.splits(train, protocols.deal_folds(train, 5), disjoint=True):
            mean, spread = x[fitted].mean(axis=0), x[fitted].std(axis=0)
            model = LogisticRegression(C=c, tol=1e-7, max_iter=10_000).fit(
                (x[fitted] - mean) / spread, train.same[fitted]
            )
            share = train.same[fitted].mean()
            llr.append(model.decision_function((x[held] - mean) / spread) - math.log(share / (1 - share)))
            labels.append(train.same[held])
        costs.append(metrics.cllr(np.concatenate(llr), np.concatenate(labels)))
    assert HEADS["logistic_abs"](train).regularisation == heads_module.GRID[int(np.argmin(costs))]


def test_a_component_that_varies_by_rounding_alone_gets_no_weight():
    train = faces(0)
    # The difference of the last component is 0.3 and gives the answer away in its thirteenth digit.
    padded = [
        np.hstack([train.a, np.full((240, 1), 0.1)]),
        np.hstack([train.b, 0.4 + 1e-13 * train.same[:, None]]),
    ]
    head = fit("logistic_abs", *padded, train.same, train.people_a, train.people_b)
    assert head.weight[-1] == 0
    assert head.weight[:-1] == pytest.approx(HEADS["logistic_abs"](train).weight, rel=1e-3)


def test_a_zero_among_the_components_is_no_fault():
    a = spoil(GOOD.a, (slice(None), 0), 0)
    assert fit("threshold", a, GOOD.b, GOOD.same).score(a, GOOD.b).shape == (240,)


def test_separable_training_pairs_give_finite_heads():
    train = faces(0, noise=0.01)
    for name in HEADS:
        head = HEADS[name](train)
        assert metrics.accuracy(head.score(train.a, train.b), train.same, head.threshold) == 1.0


# Protocols


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), people=st.integers(2, 200), folds=st.integers(2, 8), named=st.booleans())
def test_dealt_folds_cover_every_pair_once_and_share_nobody_with_their_fit(seed, people, folds, named):
    pairs = faces(seed, people=people, n=60, d=2)
    if not named:
        pairs = EmbeddedPairs(pairs.a, pairs.b, pairs.same)
    fold = protocols.deal_folds(pairs, folds)
    np.testing.assert_array_equal(protocols.deal_folds(swapped(pairs), folds), fold)
    sides = list(protocols.splits(pairs, fold, disjoint=True))
    assert sorted(i for _, test in sides for i in test) == list(range(60))
    for train, test in sides:
        assert not set(train) & set(test)
        if named:
            assert not {*pairs.people_a[train], *pairs.people_b[train]} & {*pairs.people_a[test], *pairs.people_b[test]}


def test_small_components_are_kept_whole_and_dealt_evenly():
    # 40 couples who meet nobody else, five pairs each: no pair need be left out of any fit.
    couple = np.repeat(np.arange(40), 5)
    one, other = couple, 79 - couple  # numbered so that dealing people one by one would part them
    side_a = np.where(np.tile([1, 0, 0, 1, 0], 40), one, other)
    side_b = np.where(np.tile([1, 0, 0, 0, 1], 40), one, other)
    rng = np.random.default_rng(0)
    pairs = EmbeddedPairs(rng.normal(size=(200, 2)), rng.normal(size=(200, 2)), side_a == side_b, side_a, side_b)
    fold = protocols.deal_folds(pairs, 4)
    assert np.bincount(fold).tolist() == [50, 50, 50, 50]
    assert all(len(np.unique(fold[couple == c])) == 1 for c in range(40))
    assert all(len(train) == 150 for train, _ in protocols.splits(pairs, fold, disjoint=True))


def test_folds_without_people_hold_both_kinds_evenly():
    pairs = EmbeddedPairs(*parts(faces(0, n=100, genuine=0.3), people=False))
    fold = protocols.deal_folds(pairs, 10)
    assert np.bincount(fold[pairs.same]).tolist() == [3] * 10
    assert np.bincount(fold[~pairs.same]).tolist() == [7] * 10


def test_given_folds_fit_on_every_other_fold_even_where_people_are_shared():
    pairs = faces(0, people=10, n=60)
    fold = protocols.given_folds(pairs, np.arange(60) % 3 + 5)
    for f, (train, test) in enumerate(protocols.splits(pairs, fold, disjoint=False)):
        np.testing.assert_array_equal(test, np.flatnonzero(np.arange(60) % 3 == f))
        assert len(train) == 40


def test_folds_that_agree_to_the_last_pair_do_not_make_an_interval_without_width():
    pairs = faces(0, people=30, n=120, noise=0.01)
    result = compare(*parts(pairs), folds=np.arange(120) % 4, heads=["threshold"], allow_shared=True)["threshold"]
    assert len(set(result.fold_accuracy)) == 1
    expected = uncertainty.dyadic_interval(np.ones(120), pairs.people_a, pairs.people_b)
    assert result.interval == expected
    assert expected.low < 1 == expected.high


def test_refits_widen_the_interval_over_given_folds():
    pairs = faces(0, people=30, n=120, noise=0.8)
    plain, refitted = (
        compare(*parts(pairs), folds=np.arange(120) % 4, heads=["threshold"], allow_shared=True, refit=refit)[
            "threshold"
        ]
        for refit in (0, 12)
    )
    assert plain.standard_error == refitted.standard_error > 0
    assert refitted.interval.low < plain.interval.low
    assert refitted.interval.high > plain.interval.high
    assert refitted.interval.n_effective < plain.interval.n_effective
    assert "training people are as those at hand" in refitted.interval.assumes


# Comparison


@pytest.mark.parametrize("name", HEADS)
def test_everything_fitted_comes_from_training_pairs(name):
    """Whatever the tested labels say, thresholds and heads stay; and the tested optimum is elsewhere."""
    train, test = faces(0, noise=0.2, prefix="t"), faces(1, noise=1.2, genuine=0.3)
    result = compare(*parts(test), train=train, heads=[name], fars=[0.1])[name]
    head = HEADS[name](train)
    assert result.fitted == (head,)
    assert result.threshold == head.threshold
    scores = head.score(test.a, test.b)
    np.testing.assert_array_equal(result.scores, scores)
    assert result.accuracy == metrics.accuracy(scores, test.same, head.threshold)
    assert result.accuracy < metrics.accuracy_threshold(scores, test.same)[1]  # had it peeked, these would be equal
    expected = metrics.tar_at_far(head.score(train.a, train.b), train.same, scores, test.same, far=0.1)
    assert result.tar[0.1] == expected
    assert expected.threshold != metrics.threshold_at_far(scores, test.same, 0.1)
    assert (result.auc, result.eer) == (metrics.auc(scores, test.same), metrics.eer(scores, test.same))
    relabelled = compare(test.a, test.b, ~test.same, train=parts(train), heads=[name], fars=[0.1])[name]
    assert relabelled.fitted == result.fitted
    assert relabelled.tar[0.1].threshold == result.tar[0.1].threshold


def test_given_folds_follow_lfw_view_2():
    pairs = faces(0, n=200, people=150, noise=1.0)
    fold = np.arange(200) % 10
    result = compare(*parts(pairs), folds=fold, heads=["threshold"], fars=[0.1], allow_shared=True)["threshold"]
    shares, thresholds = [], []
    for f in range(10):
        head = fit("threshold", *parts(pairs.take(fold != f)))
        held = pairs.take(fold == f)
        shares.append(metrics.accuracy(head.score(held.a, held.b), held.same, head.threshold))
        thresholds.append(head.threshold)
    assert result.fold_accuracy == tuple(shares)
    assert result.threshold == tuple(thresholds)
    assert len(set(thresholds)) > 1
    assert result.accuracy == pytest.approx(np.mean(shares))
    assert result.standard_error == pytest.approx(np.std(shares, ddof=1) / math.sqrt(10))
    # 2.262157 is Student's t, 97.5 %, 9 degrees of freedom.
    assert result.interval.high - result.accuracy == pytest.approx(2.262157 * result.standard_error, rel=1e-6)
    assert result.tar[0.1].n_impostor_train == min((~pairs.same[fold != f]).sum() for f in range(10))
    accepted = sum(
        (result.scores[fold == f] >= result.tar[0.1].threshold[f])[~pairs.same[fold == f]].sum() for f in range(10)
    )
    assert result.tar[0.1].far == pytest.approx(accepted / (~pairs.same).sum())


def test_without_training_pairs_folds_are_dealt_and_every_pair_is_tested_by_strangers():
    pairs = faces(0, n=300, people=200, noise=0.5)
    results = compare(*parts(pairs), heads=QUICK_HEADS)
    result = results["threshold"]
    assert len(result.fitted) == 10
    cut = np.asarray(result.threshold)[protocols.deal_folds(pairs, 10)]
    assert result.accuracy == np.mean((result.scores >= cut) == pairs.same)
    assert results.warnings == ()
    assert "share nobody" in results.protocol
    assert len(compare(*parts(pairs), folds=3, heads=["threshold"])["threshold"].fitted) == 3


def test_intervals_widen_for_pairs_that_share_people_and_say_what_they_assume():
    base = faces(1, n=120, people=240, noise=1.0)
    # The same 120 pairs ten times over: no more is known than from one copy.
    test = base.take(np.tile(np.arange(120), 10))
    train = faces(0, noise=1.0, prefix="t")
    named = compare(*parts(test), train=train, heads=["threshold"])
    blind = compare(*parts(test, people=False), train=train, heads=["threshold"])
    assert named["threshold"].accuracy == blind["threshold"].accuracy
    assert named["threshold"].interval.n_effective < 150
    assert blind["threshold"].interval.n_effective == 1200
    assert named["threshold"].standard_error > 3 * blind["threshold"].standard_error
    assert "without a person in common" in str(named)
    assert "too narrow" in str(blind)
    assert named.n_people == len({*test.people_a, *test.people_b})
    assert blind.n_people is None


def test_people_on_both_sides_are_reported():
    train, test = faces(0), faces(1, prefix="q")
    renamed = (
        np.where(test.people_a == "q003", "p003", test.people_a),
        np.where(test.people_b == "q003", "p003", test.people_b),
    )
    assert compare(*parts(test), train=train, heads=["threshold"]).warnings == ()
    rows = np.flatnonzero((renamed[0] == "p003") | (renamed[1] == "p003"))
    told = (
        f"1 people are among the tested and the training people \\(p003\\), in {len(rows)} tested pairs, first at rows "
    )
    with pytest.raises(ValueError, match=told + re.escape(str(rows[:5].tolist())) + ".*allow_shared=True"):
        compare(test.a, test.b, test.same, *renamed, train=train, heads=["threshold"])
    leaky = compare(test.a, test.b, test.same, *renamed, train=train, heads=["threshold"], allow_shared=True)
    assert any("(p003): the figures flatter the heads" in w for w in leaky.warnings)
    assert "WARNING: 1 people are among" in str(leaky)
    blind = compare(*parts(test, people=False), train=train, heads=["threshold"])
    assert any("people were not given" in w for w in blind.warnings)
    with pytest.raises(ValueError, match="20 people are in more than one fold .* in 240 tested pairs"):
        compare(*parts(faces(0, people=20)), folds=np.arange(240) % 3, heads=["threshold"])
    folded = compare(*parts(faces(0, people=20)), folds=np.arange(240) % 3, heads=["threshold"], allow_shared=True)
    assert any("people are in more than one fold" in w for w in folded.warnings)
    with pytest.raises(ValueError, match="cannot be compared"):
        compare(*parts(test)[:3], test.same * 0, test.same * 1 - 1, train=train, heads=["threshold"])


def test_results_do_not_depend_on_sides_or_order():
    train, test = faces(0, prefix="t"), faces(1, noise=1.0)
    order = np.random.default_rng(0).permutation(len(test))
    first = compare(*parts(test), train=train)
    for other in (
        compare(*parts(swapped(test)), train=swapped(train)),
        compare(*parts(test.take(order)), train=train),
    ):
        for name in first:
            for quantity in ("accuracy", "auc", "eer", "standard_error"):
                assert getattr(other[name], quantity) == pytest.approx(getattr(first[name], quantity), abs=1e-12)


def test_the_table_withholds_what_the_pairs_cannot_resolve():
    train, test = faces(0, n=400, prefix="t"), faces(1, n=400)
    text = str(compare(*parts(test), train=train, heads=["threshold"], fars=[0.15, 0.05, 0.01]))
    row = next(line for line in text.splitlines() if line.startswith("threshold"))
    cells = row.split("  ")
    assert any(cell.strip().startswith("~") for cell in cells)  # 200 impostors at 5 %: between 10 and 30 expected
    assert "not resolvable (needs 3,000)" in row
    assert "~ rests on fewer than 30" in text
    assert "TAR @ FAR 15 %" in text


def test_results_are_written_as_json_with_their_resolution(tmp_path):
    results = compare(*parts(faces(1)), train=faces(0, prefix="t"), fars=[0.1])
    report.write_json(tmp_path / "results.json", results)
    read = json.loads((tmp_path / "results.json").read_text())
    assert read["heads"]["threshold"]["accuracy"] == results["threshold"].accuracy
    assert read["heads"]["threshold"]["tar"][0] == {
        **{k: getattr(results["threshold"].tar[0.1], k) for k in ("target", "threshold", "tar", "far")},
        **{"n_genuine": 120, "n_impostor": 120, "n_impostor_train": 120, "resolution": "flagged", "needs": 300},
    }
    assert Head.from_dict(read["heads"]["logistic_abs"]["fitted"][0]) == results["logistic_abs"].fitted[0]
    assert read["heads"]["threshold"]["cllr"] is None
    assert read["heads"]["logistic_abs"]["cllr"] == results["logistic_abs"].cllr


def test_the_results_name_their_heads():
    results = compare(*parts(faces(1)), train=faces(0, prefix="t"), heads=QUICK_HEADS)
    assert tuple(results) == QUICK_HEADS
    assert len(results) == 2
    with pytest.raises(KeyError, match=r"logistic_abs.*threshold, logistic_distance"):
        results["logistic_abs"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare(spoil(GOOD.a, [3, 9], np.nan), GOOD.b, GOOD.same), r"2 rows of a are not finite.*\[3, 9\]"),
        (lambda: compare(GOOD.a, spoil(GOOD.b, [4], np.inf), GOOD.same), r"1 rows of b are not finite.*\[4\]"),
        (lambda: compare(GOOD.a, spoil(GOOD.b, [7], 0), GOOD.same), r"1 rows of b are all zero.*\[7\]"),
        (lambda: compare(GOOD.a, GOOD.b, np.ones(240, bool), train=GOOD), "tested pairs: 240 genuine and 0 impostor"),
        (
            lambda: compare(*parts(GOOD), train=(GOOD.a, GOOD.b, np.zeros(240, bool))),
            "training pairs: 0 genuine and 240 impostor",
        ),
        (lambda: compare(*parts(GOOD), train=(GOOD.a[:, 0], GOOD.b, GOOD.same)), "training pairs: a has shape"),
        (lambda: compare(*parts(GOOD), train=(GOOD.a, GOOD.b)), "train has 2 parts"),
        (lambda: compare(*parts(GOOD), train=faces(0, d=4)), "training embeddings have 4 numbers and tested ones 8"),
        (lambda: compare(*parts(GOOD), train=GOOD, folds=3), "both train and folds"),
        (lambda: compare(GOOD.a[:5], GOOD.b, GOOD.same), "a has 5 rows for 240 labels"),
        (lambda: compare(GOOD.a[:, :3], GOOD.b, GOOD.same), "a has 3 numbers a row and b 8"),
        (lambda: compare(GOOD.a.ravel(), GOOD.b, GOOD.same), r"a has shape \(1920,\)"),
        (lambda: compare(GOOD.a, GOOD.b, GOOD.same[:, None]), r"same has shape \(240, 1\)"),
        (lambda: compare(GOOD.a, GOOD.b, GOOD.same + 1), "same holds"),
        (lambda: compare(*parts(GOOD)[:4]), "people are given for one side only"),
        (lambda: compare(*parts(GOOD)[:3], GOOD.people_a[:2], GOOD.people_b), r"people_a has shape \(2,\)"),
        (lambda: compare(*parts(GOOD)[:3], GOOD.people_a, GOOD.people_a), "same contradicts the people in 120 pairs"),
        (lambda: compare(*parts(GOOD), heads=["magic"]), "no head 'magic': use one of threshold"),
        (lambda: compare(*parts(GOOD), heads=[]), "no heads to compare"),
        (lambda: compare(*parts(GOOD), heads=["threshold", "threshold"]), "name one twice"),
        (lambda: compare(*parts(GOOD), folds=1), "folds is 1"),
        (lambda: compare(*parts(GOOD), folds=np.zeros(240, int)), r"every pair is in fold \[0\]"),
        (lambda: compare(*parts(GOOD), folds=np.arange(3)), r"folds has shape \(3,\)"),
        (lambda: compare(*parts(GOOD), folds=np.linspace(0, 1, 240)), "folds are float64"),
        (lambda: compare(*parts(GOOD.take(np.arange(6))), folds=7), "6 pairs cannot make 7 folds"),
        (lambda: compare(*parts(GOOD), folds=GOOD.same.astype(int)), "left to fit on while fold 0 is tested"),
        (lambda: compare(*parts(GOOD), train=GOOD, fars=[0], allow_shared=True), "far is 0"),
        (lambda: fit("threshold", GOOD.a, GOOD.b, GOOD.same).score(GOOD.a[:, :3], GOOD.b[:, :3]), "fitted on 8"),
    ],
)
def test_unusable_input_is_refused_with_its_rows(call, message):
    with pytest.raises(ValueError, match=message):
        call()

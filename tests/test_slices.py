"""Slices of the tested pairs: counts by hand, and thresholds that stay."""

import numpy as np
import pytest

from faceembed import metrics, uncertainty
from faceembed.verification import EmbeddedPairs, compare
from faceembed.verification.slices import by_cluster, slice_report
from tests.test_verification import faces, parts

TRAIN, TEST = faces(0, prefix="t"), faces(1, noise=1.0)
RESULT = compare(*parts(TEST), train=TRAIN, heads=["threshold"])["threshold"]


def test_rates_are_counts_at_the_threshold_of_all_pairs():
    mask = np.arange(len(TEST)) % 3 == 0
    everyone, part = slice_report(RESULT, TEST.same, {"third": mask}, TEST.people_a, TEST.people_b)
    refused = RESULT.scores < RESULT.threshold
    assert part.fnmr == refused[mask & TEST.same].mean()
    assert part.fmr == (~refused)[mask & ~TEST.same].mean()
    assert part.auc == metrics.auc(RESULT.scores[mask], TEST.same[mask])
    assert (part.n_genuine, part.n_impostor) == ((mask & TEST.same).sum(), (mask & ~TEST.same).sum())
    assert part.n_people == len({*TEST.people_a[mask], *TEST.people_b[mask]})
    chosen = mask & TEST.same
    assert part.fnmr_interval == uncertainty.dyadic_interval(
        refused[chosen], TEST.people_a[chosen], TEST.people_b[chosen]
    )
    wrong = everyone.n_genuine * everyone.fnmr + everyone.n_impostor * everyone.fmr
    assert wrong / len(TEST) == pytest.approx(1 - RESULT.accuracy)


def test_a_slice_of_one_kind_has_one_rate():
    [_, part] = slice_report(RESULT, TEST.same, {"genuine": TEST.same})
    assert (part.fmr, part.auc, part.n_people) == (None, None, None)
    assert "ALL pairs are independent" in part.fnmr_interval.assumes
    assert part.row()["FMR"] == part.row()["AUC"] == "-"


def test_a_slice_of_badly_embedded_photos_stands_out():
    rng = np.random.default_rng(0)
    dark = rng.random(len(TEST)) < 0.3
    noise = np.where(dark, 1.5, 0.0)[:, None] * rng.normal(size=TEST.a.shape)
    spoiled = EmbeddedPairs(TEST.a + noise, TEST.b, TEST.same, TEST.people_a, TEST.people_b)
    result = compare(*parts(spoiled), train=TRAIN, heads=["threshold"])["threshold"]
    _, inside, outside = slice_report(result, spoiled.same, {"dark": dark, "light": ~dark})
    assert inside.fnmr_interval.low > outside.fnmr


def test_clusters_hold_pairs_whose_photos_both_lie_in_them():
    rng = np.random.default_rng(1)
    side = rng.integers(0, 2, (2, 400))
    where = np.array([[5.0, 0.0], [-5.0, 0.0]])
    a, b = (where[s] + 0.1 * rng.normal(size=(400, 2)) for s in side)
    masks = by_cluster(EmbeddedPairs(a, b, rng.random(400) < 0.5), 2)
    assert sorted(m.sum() for m in masks.values()) == sorted(((side == k).all(axis=0)).sum() for k in (0, 1))
    larger = int(np.bincount(side.ravel()).argmax())
    assert next(iter(masks)) == f"cluster 1 ({(side == larger).sum()} photos)"
    np.testing.assert_array_equal(next(iter(masks.values())), (side == larger).all(axis=0))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"none": np.zeros(len(TEST), bool)}, "slice none has no pair"),
        ({"short": np.ones(3, bool)}, "slice short is bool"),
        ({"ints": np.ones(len(TEST), int)}, "slice ints is int64"),
    ],
)
def test_impossible_slices_are_refused(masks, message):
    with pytest.raises(ValueError, match=message):
        slice_report(RESULT, TEST.same, masks)
    with pytest.raises(ValueError, match="clusters is 1"):
        by_cluster(TEST, 1)

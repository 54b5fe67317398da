"""The field's scripts, transcribed as they stand, against our parity figures."""

import numpy as np
import pytest
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.model_selection import KFold

from faceembed.verification.parity import parity


def scripts(a, b, same):
    """facenet's calculate_roc and calculate_val with their loops; duplicates dropped as its forks do."""
    dist = np.sum(np.square(a - b), 1)

    def rates(threshold, dist, issame):
        predict = np.less(dist, threshold)
        tp = np.sum(np.logical_and(predict, issame))
        fp = np.sum(np.logical_and(predict, np.logical_not(issame)))
        tn = np.sum(np.logical_and(np.logical_not(predict), np.logical_not(issame)))
        fn = np.sum(np.logical_and(np.logical_not(predict), issame))
        tpr = 0 if (tp + fn == 0) else float(tp) / float(tp + fn)
        fpr = 0 if (fp + tn == 0) else float(fp) / float(fp + tn)
        return tpr, fpr, float(tp + tn) / dist.size

    thresholds = np.arange(0, 4, 0.01)
    tprs, fprs, accuracy = np.zeros((10, 400)), np.zeros((10, 400)), np.zeros(10)
    folds = list(KFold(n_splits=10, shuffle=False).split(np.arange(len(same))))
    for fold, (train, test) in enumerate(folds):
        acc_train = [rates(t, dist[train], same[train])[2] for t in thresholds]
        for i, t in enumerate(thresholds):
            tprs[fold, i], fprs[fold, i], _ = rates(t, dist[test], same[test])
        accuracy[fold] = rates(thresholds[np.argmax(acc_train)], dist[test], same[test])[2]
    tpr, fpr = np.mean(tprs, 0), np.mean(fprs, 0)
    eer = brentq(lambda x: 1.0 - x - interp1d(fpr, tpr)(x), 0.0, 1.0)

    thresholds = np.arange(0, 4, 0.001)
    val, far = np.zeros(10), np.zeros(10)
    for fold, (train, test) in enumerate(folds):
        far_train = np.array([rates(t, dist[train], same[train])[1] for t in thresholds])
        threshold = 0.0
        if np.max(far_train) >= 1e-3:
            unique, index = np.unique(far_train, return_index=True)
            threshold = interp1d(unique, thresholds[index], kind="slinear")(1e-3)
        val[fold], far[fold], _ = rates(threshold, dist[test], same[test])
    return np.mean(accuracy), np.std(accuracy), np.mean(val), np.std(val), np.mean(far), np.trapezoid(tpr, fpr), eer


def pairs(seed, n=200, spread=0.7):
    rng = np.random.default_rng(seed)
    same = rng.random(n) < 0.5
    a = rng.normal(size=(n, 6))
    b = np.where(same[:, None], a, rng.normal(size=(n, 6))) + spread * rng.normal(size=(n, 6))
    return *(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)), same


@pytest.mark.parametrize("seed", range(3))
def test_the_figures_are_those_of_the_scripts(seed):
    a, b, same = pairs(seed)
    found = parity(a, b, same)
    ours = found.accuracy, found.accuracy_std, found.val, found.val_std, found.far, found.auc, found.eer
    np.testing.assert_allclose(ours, scripts(a, b, same), rtol=1e-12, atol=1e-12)


def test_scipy_refuses_what_the_scripts_do():
    """Why VAL@FAR cannot be theirs to the letter: were it accepted again, `parity` should follow."""
    with pytest.raises(ValueError, match="duplicates"):
        interp1d([0.0, 0.0, 0.5, 1.0], [0.0, 0.1, 0.2, 0.3], kind="slinear")


def test_long_features_leave_the_grid_and_that_is_said():
    a, b, same = pairs(0)
    assert not any("grid" in note for note in parity(a, b, same).notes)
    found = parity(3 * a, 3 * b, same)
    assert any("the grid ends at 4" in note for note in found.notes)
    assert found.auc < parity(a, b, same).auc  # the ROC ends where the grid does


def test_a_list_with_all_genuine_pairs_first_is_interleaved():
    a, b, same = pairs(0)
    order = np.argsort(~same, kind="stable")
    found = parity(a[order], b[order], same[order])
    assert any("interleaved" in note for note in found.notes)
    genuine, impostor = np.flatnonzero(same), np.flatnonzero(~same)
    place = np.concatenate([(np.arange(len(kind)) + 0.5) / len(kind) for kind in (genuine, impostor)])
    again = np.concatenate([genuine, impostor])[np.argsort(place, kind="stable")]
    expected = scripts(a[again], b[again], same[again])
    ours = found.accuracy, found.accuracy_std, found.val, found.val_std, found.far, found.auc, found.eer
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12)


def test_too_few_pairs_of_a_kind_leave_no_validation_rate():
    a, b, same = pairs(0)
    few = same & (np.cumsum(same) <= 5) | ~same
    found = parity(a[few], b[few], same[few])
    assert (found.val, found.val_std, found.far) == (None, None, None)
    assert "Validation rate: -+-- @ FAR=-" in str(found)
    assert any("one kind only" in note for note in found.notes)


def test_the_order_of_pairs_matters_to_them():
    a, b, same = pairs(1)
    order = np.random.default_rng(0).permutation(len(same))
    assert parity(a, b, same).accuracy_std != parity(a[order], b[order], same[order]).accuracy_std
    with pytest.raises(ValueError, match="200 pairs cannot make 201 folds"):
        parity(a, b, same, folds=201)

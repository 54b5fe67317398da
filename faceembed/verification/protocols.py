"""Who fits and who is tested: folds of pairs in which no person stands on both sides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from faceembed.verification.features import EmbeddedPairs

__all__ = ["deal_folds", "given_folds", "shared_people", "splits"]

Ints = NDArray[np.int64]


def _index(people_a: NDArray[Any], people_b: NDArray[Any]) -> tuple[Ints, Ints, int]:
    names, index = np.unique(np.concatenate([people_a, people_b]), return_inverse=True)
    n = len(people_a)
    return index[:n].astype(np.int64), index[n:].astype(np.int64), len(names)


def deal_folds(pairs: EmbeddedPairs, folds: int) -> Ints:
    """Deals pairs into folds by person.

    Components of the graph whose edges are the pairs are dealt whole, the one with most pairs first, each to the fold
    that holds fewest pairs so far. A component with more than 1/folds of all pairs (in a list of random impostor pairs
    nearly everyone is joined) is dealt person by person in the same way; a pair across two folds then goes to that of
    its person who comes first in sorted order. `splits` keeps the two sides apart afterwards.

    Without people the genuine pairs are dealt out in turn, then the impostor pairs, in their given order: a person may
    then stand on both sides.

    Args:
      pairs: n pairs, with or without people.
      folds: at least 2.

    Returns:
      [n] int64 in [0, folds). It depends on the people and the labels alone, not on which side is a or b.

    Raises:
      ValueError: fewer than 2 folds, or fewer pairs than folds.
    """
    if folds < 2:
        raise ValueError(f"folds is {folds}: at least two are needed, one to fit on and one to test.")
    if len(pairs) < folds:
        raise ValueError(f"{len(pairs)} pairs cannot make {folds} folds: give more pairs or fewer folds.")
    if pairs.people_a is None or pairs.people_b is None:
        fold = np.empty(len(pairs), np.int64)
        order = np.concatenate([np.flatnonzero(pairs.same), np.flatnonzero(~pairs.same)])
        fold[order] = np.arange(len(pairs)) % folds
        return fold
    a, b, m = _index(pairs.people_a, pairs.people_b)
    _, part = connected_components(coo_matrix((np.ones(len(a), bool), (a, b)), (m, m)), directed=False)
    big = np.bincount(part[a]) * folds > len(a)
    # A person of a big component is a unit of their own; everyone else belongs to their component's unit.
    _, unit = np.unique(np.where(big[part], len(big) + np.arange(m), part), return_inverse=True)
    first = np.minimum(a, b)
    size = np.bincount(unit[first], minlength=unit.max() + 1)
    load = np.zeros(folds, np.int64)
    fold_of_unit = np.empty(len(size), np.int64)
    for u in np.argsort(-size, kind="stable"):
        fold_of_unit[u] = np.argmin(load)
        load[fold_of_unit[u]] += max(1, size[u])
    return fold_of_unit[unit[first]]


def given_folds(pairs: EmbeddedPairs, fold: ArrayLike) -> Ints:
    """Checks folds that a protocol prescribes, such as LFW View 2's ten.

    Args:
      pairs: n pairs.
      fold: [n] int, any labels, at least two different ones.

    Returns:
      [n] int64 in [0, number of folds), in the order of the sorted labels.

    Raises:
      ValueError: the length differs, a label is not an integer, or there is one fold only.
    """
    f = np.asarray(fold)
    if f.shape != (len(pairs),):
        raise ValueError(f"folds has shape {f.shape} for {len(pairs)} pairs: give one a pair, or a number of folds.")
    if not np.issubdtype(f.dtype, np.integer):
        raise ValueError(f"folds are {f.dtype}: give integers, one a pair.")
    labels, index = np.unique(f, return_inverse=True)
    if len(labels) < 2:
        raise ValueError(f"every pair is in fold {labels.tolist()}: at least two folds are needed.")
    return index.astype(np.int64)


def splits(pairs: EmbeddedPairs, fold: Ints, *, disjoint: bool) -> Iterator[tuple[Ints, Ints]]:
    """Each fold in turn as the test, with the pairs to fit on.

    Args:
      pairs: n pairs.
      fold: [n] int in [0, k).
      disjoint: leave out of the fit every pair that has a person in common with a tested pair. False is right for
        published folds, where all other folds fit (LFW View 2; its folds share nobody). It has no effect where people
        are unknown.

    Yields:
      (fit, test): positions of pairs. Each pair is in exactly one test.
    """
    a = b = None
    if disjoint and pairs.people_a is not None and pairs.people_b is not None:
        a, b, m = _index(pairs.people_a, pairs.people_b)
    for f in range(int(fold.max()) + 1):
        held = fold == f
        fit = ~held
        if a is not None and b is not None:
            tested = np.zeros(m, bool)
            tested[a[held]] = tested[b[held]] = True
            fit &= ~(tested[a] | tested[b])
        yield np.flatnonzero(fit), np.flatnonzero(held)


def shared_people(train: EmbeddedPairs, test: EmbeddedPairs) -> list[Any]:
    """People who are in both, sorted; empty where either does not say who its people are.

    Raises:
      ValueError: one has numbers for people and the other has names, so that the two cannot be compared.
    """
    if train.people_a is None or test.people_a is None or train.people_b is None or test.people_b is None:
        return []
    there = np.concatenate([train.people_a, train.people_b])
    here = np.concatenate([test.people_a, test.people_b])
    if (there.dtype.kind in "iu") != (here.dtype.kind in "iu"):
        raise ValueError(
            f"training people are {there.dtype} and tested people {here.dtype}: they cannot be compared, so nobody "
            "could tell whether some are in both. Use names, or numbers of one list, in both."
        )
    return np.intersect1d(there, here).tolist()

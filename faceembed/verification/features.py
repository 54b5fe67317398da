"""Pairs of embeddings, and the symmetric features of a pair that heads work on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEATURES", "EmbeddedPairs", "abs_difference", "squared_distance"]

Floats = NDArray[np.floating]


@dataclasses.dataclass(frozen=True)
class EmbeddedPairs:
    """Pairs of embeddings with their labels, checked when made.

    Attributes:
      a, b: [n, d] float embeddings of the two sides; float32 and float64 are kept, other types become float64.
      same: [n] bool, True where both sides show one person.
      people_a, people_b: [n] who is on each side, in ids of one comparable type, or None for both. They serve to fold
        by person and to size intervals; they never enter a score.

    Raises:
      ValueError: an array has the wrong rank or length, a row is NaN, infinite or all zero, or `same` contradicts the
        people. The message names the rows.
    """

    a: Floats
    b: Floats
    same: NDArray[np.bool_]
    people_a: NDArray[Any] | None = None
    people_b: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        same = np.asarray(self.same)
        if same.ndim != 1:
            raise ValueError(f"same has shape {same.shape}: give one label a pair, [n].")
        if not np.isin(same, (0, 1)).all():
            raise ValueError(f"same holds {np.unique(same)[:5].tolist()}: give booleans, True for the same person.")
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  (how a frozen dataclass converts)
        set_("same", same.astype(bool))
        for name in ("a", "b"):
            set_(name, _embeddings(name, getattr(self, name), len(same)))
        if self.a.shape != self.b.shape:
            raise ValueError(
                f"a has {self.a.shape[1]} numbers a row and b {self.b.shape[1]}: both sides must come from one encoder."
            )
        if (self.people_a is None) != (self.people_b is None):
            raise ValueError("people are given for one side only: give people_a and people_b, or neither.")
        if self.people_a is None or self.people_b is None:
            return
        for name in ("people_a", "people_b"):
            people = np.asarray(getattr(self, name))
            if people.shape != same.shape:
                raise ValueError(f"{name} has shape {people.shape} for {len(same)} pairs: give one person a pair.")
            set_(name, people)
        wrong = np.flatnonzero((self.people_a == self.people_b) != self.same)
        if len(wrong):
            raise ValueError(
                f"same contradicts the people in {len(wrong)} pairs, first at rows {wrong[:5].tolist()}: "
                "a pair is genuine exactly when both sides have one person."
            )

    def __len__(self) -> int:
        return len(self.same)

    def take(self, index: NDArray[Any]) -> EmbeddedPairs:
        """The pairs at `index`: [m] int positions or [n] bool."""
        return EmbeddedPairs(
            self.a[index],
            self.b[index],
            self.same[index],
            None if self.people_a is None else self.people_a[index],
            None if self.people_b is None else self.people_b[index],
        )

    def require_both_classes(self, what: str) -> None:
        """Raises ValueError, beginning with `what`, unless there are genuine and impostor pairs."""
        genuine = int(self.same.sum())
        if genuine in (0, len(self)):
            raise ValueError(
                f"{what}: {genuine} genuine and {len(self) - genuine} impostor pairs; at least one of each is needed."
            )


def _embeddings(name: str, value: Any, n: int) -> Floats:
    emb = np.asarray(value)
    if emb.ndim != 2 or emb.shape[1] == 0:
        raise ValueError(f"{name} has shape {emb.shape}: give embeddings [n, d], one row a photo.")
    if len(emb) != n:
        raise ValueError(f"{name} has {len(emb)} rows for {n} labels: give one row a pair on each side.")
    if emb.dtype not in (np.float32, np.float64):
        emb = emb.astype(np.float64)
    for found, rows in (
        ("not finite", np.flatnonzero(~np.isfinite(emb).all(axis=1))),
        ("all zero", np.flatnonzero(~emb.any(axis=1))),
    ):
        if len(rows):
            raise ValueError(
                f"{len(rows)} rows of {name} are {found}, first at {rows[:5].tolist()}: such an embedding says nothing "
                "about a face. Embed these photos again, or leave their pairs out."
            )
    return emb


def squared_distance(a: Floats, b: Floats) -> NDArray[np.float64]:
    """Squared Euclidean distance of each pair, [n, 1], in float64 (0 to 4 for unit vectors)."""
    difference = np.subtract(a, b, dtype=np.float64)
    return np.einsum("nd,nd->n", difference, difference)[:, None]


def abs_difference(a: Floats, b: Floats) -> NDArray[np.float64]:
    """|f(a) - f(b)| by component, [n, d], in float64: the features of the Siamese network's logistic unit."""
    return np.abs(np.subtract(a, b, dtype=np.float64))


FEATURES: dict[str, Callable[[Floats, Floats], NDArray[np.float64]]] = {
    "abs_difference": abs_difference,
    "squared_distance": squared_distance,
}
"""Features of a pair, [n, d] × [n, d] → [n, k], each exactly symmetric in its arguments."""

"""Pairs of embeddings, and the symmetric features of a pair that heads work on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FEATURES",
    "EmbeddedPairs",
    "abs_difference",
    "abs_difference_and_dot",
    "chi_square",
    "chi_square_halves",
    "cosine",
    "product",
    "squared_difference",
    "squared_distance",
]

Floats = NDArray[np.floating]


@dataclasses.dataclass(frozen=True)
class EmbeddedPairs:
    """Pairs of embeddings with their labels, checked when made.

    Attributes:
      a, b: [n, d] float embeddings of the two sides; float32 and float64 are kept, other types become float64.
      same: [n] bool, True where both sides show one person.
      people_a, people_b: [n] who is on each side, in ids of one comparable type, or None for both. They serve to fold
        by person and to size intervals; they never enter a score.
      layers: name → (a, b), [n, k] each: other features of the same photos, such as an encoder's inner layers, for heads
        named "HEAD@LAYER".

    Raises:
      ValueError: an array has the wrong rank or length, a row is NaN, infinite or all zero, or `same` contradicts the
        people. The message names the rows.
    """

    a: Floats
    b: Floats
    same: NDArray[np.bool_]
    people_a: NDArray[Any] | None = None
    people_b: NDArray[Any] | None = None
    layers: Mapping[str, tuple[Floats, Floats]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        same = np.asarray(self.same)
        if same.ndim != 1:
            raise ValueError(f"same has shape {same.shape}: give one label a pair, [n].")
        if not np.isin(same, (0, 1)).all():
            raise ValueError(f"same holds {np.unique(same)[:5].tolist()}: give booleans, True for the same person.")
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  (how a frozen dataclass converts)
        set_("same", same.astype(bool))
        for name in ("a", "b"):
            set_(name, require_embeddings(name, getattr(self, name), len(same)))
        if self.a.shape != self.b.shape:
            raise ValueError(
                f"a has {self.a.shape[1]} numbers a row and b {self.b.shape[1]}: both sides must come from one encoder."
            )
        checked = {}
        for layer, (a, b) in self.layers.items():
            checked[layer] = (
                require_embeddings(f"a@{layer}", a, len(same)),
                require_embeddings(f"b@{layer}", b, len(same)),
            )
            if checked[layer][0].shape != checked[layer][1].shape:
                raise ValueError(f"layer {layer} has {np.shape(a)} on one side and {np.shape(b)} on the other.")
        set_("layers", checked)
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
            {name: (a[index], b[index]) for name, (a, b) in self.layers.items()},
        )

    def at(self, layer: str | None) -> EmbeddedPairs:
        """The same pairs with a layer's features in the place of the embeddings; themselves for None.

        Raises:
          ValueError: there is no such layer.
        """
        if layer is None:
            return self
        if layer not in self.layers:
            known = ", ".join(self.layers) or "none"
            raise ValueError(
                f"there is no layer {layer!r} among the features given: {known}. Embed with that layer too."
            )
        a, b = self.layers[layer]
        return EmbeddedPairs(a, b, self.same, self.people_a, self.people_b)

    def require_both_classes(self, what: str) -> None:
        """Raises ValueError, beginning with `what`, unless there are genuine and impostor pairs."""
        genuine = int(self.same.sum())
        if genuine in (0, len(self)):
            raise ValueError(
                f"{what}: {genuine} genuine and {len(self) - genuine} impostor pairs; at least one of each is needed."
            )


def require_embeddings(name: str, value: Any, n: int) -> Floats:
    """Embeddings as floats, checked.

    Args:
      name: what to call them in an error.
      value: [n, d]; float32 and float64 are kept, other types become float64.
      n: rows that there must be.

    Raises:
      ValueError: the wrong rank or length, or rows that are NaN, infinite or all zero, which are named.
    """
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


def cosine(a: Floats, b: Floats) -> NDArray[np.float64]:
    """Cosine similarity of each pair, [n, 1], in float64, -1 to 1. On unit vectors it is 1 - squared distance / 2."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    dot = np.einsum("nd,nd->n", a, b)
    return (dot / np.sqrt(np.einsum("nd,nd->n", a, a) * np.einsum("nd,nd->n", b, b)))[:, None]


def squared_difference(a: Floats, b: Floats) -> NDArray[np.float64]:
    """(f(a) - f(b))² by component, [n, d], in float64: a weight for each, and the distance is a weighted Euclidean one."""
    return np.square(np.subtract(a, b, dtype=np.float64))


def product(a: Floats, b: Floats) -> NDArray[np.float64]:
    """f(a) f(b) by component, [n, d], in float64: a weighted inner product."""
    return np.multiply(a, b, dtype=np.float64)


def abs_difference_and_dot(a: Floats, b: Floats) -> NDArray[np.float64]:
    """|f(a) - f(b)| by component joined with f(a)·f(b), [n, d + 1], in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.concatenate([np.abs(a - b), np.einsum("nd,nd->n", a, b)[:, None]], axis=1)


def chi_square(a: Floats, b: Floats) -> NDArray[np.float64]:
    """(a - b)² / (a + b) by component, [n, d], in float64, 0 where both are 0: for NON-NEGATIVE features.

    The sum of two signed components crosses zero, and the quotient with it: two numbers of opposite sign and nearly the
    same size give an arbitrarily large value of either sign. That says nothing about the faces.

    Raises:
      ValueError: a component is negative.

    References:
      Taigman et al., "DeepFace" (2014), section 4.1, on features that are non-negative by their ReLU and lie in [0, 1].
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    if (a < 0).any() or (b < 0).any():
        raise ValueError(
            "chi-square features take non-negative numbers, and these embeddings have negative ones: a + b crosses zero. "
            "Use an encoder's layer after its activation (HEAD@LAYER), or chi_square_halves."
        )
    total = a + b
    return np.square(a - b) / np.where(total > 0, total, 1.0)


def chi_square_halves(a: Floats, b: Floats) -> NDArray[np.float64]:
    """Chi-square features of signed embeddings, [n, 2d]: of their positive parts, then of their negative parts.

    max(x, 0) and max(-x, 0) are non-negative and together say all that x says. The other way out, adding a constant
    that makes everything positive, loses the point: with x + 1 for unit vectors of 128 numbers the denominators are all
    nearly 2, and what is left is `squared_difference` over two.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.concatenate(
        [chi_square(np.maximum(a, 0), np.maximum(b, 0)), chi_square(np.maximum(-a, 0), np.maximum(-b, 0))], axis=1
    )


FEATURES: dict[str, Callable[[Floats, Floats], NDArray[np.float64]]] = {
    "abs_difference": abs_difference,
    "abs_difference_and_dot": abs_difference_and_dot,
    "chi_square": chi_square,
    "chi_square_halves": chi_square_halves,
    "cosine": cosine,
    "product": product,
    "squared_difference": squared_difference,
    "squared_distance": squared_distance,
}
"""Features of a pair, [n, d] × [n, d] → [n, k], each exactly symmetric in its arguments."""

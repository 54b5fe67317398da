"""Which triplets: online mining over the global batch.

An anchor A, a positive P (another photo of the same person) and a negative N (a photo of somebody else) form a
*valid* triplet. Nothing is promised about a batch: ids in any order, any number of photos a person, singletons.

There are two kinds of miner. *Index miners* list triplets and are not differentiated; `losses.triplet_loss` recomputes
the distances of the listed triplets alone, so that its backward pass touches nothing else. *Reducers* sum over many
triplets without listing them. `MINERS` names both. Ties between computed distances go to the lowest global index.

Each function sees `b` anchors (those of this device) against `C` candidates: the `B` photos of the global batch, and
after them the embeddings of a memory, if there is one, which serve as negatives only. It contains no collective, so that
it means the same under jit, shard_map and pmap.

References:
  Schroff et al. 2015, FaceNet, section 3.2 (semi-hard). Hermans et al. 2017, In Defense of the Triplet Loss, eqs. 5
  and 8 (batch hard, batch all).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

BLOCK = 2**20
"""Distances that `hardest` looks at together: 4 MiB of float32."""


class Group(NamedTuple):
    """Candidates sorted by person, and where in them each anchor's person stands.

    Attributes:
      order: [m] int32 indices of candidates sorted by person, ties by index; those that do not count come last.
      size: [] int32, how many count.
      start: [b] int32, where the anchor's person starts in `order`.
      photos: [b] int32, how many the anchor's person has.
    """

    order: Array
    size: Array
    start: Array
    photos: Array

    def other(self, r: Array) -> Array:
        """[b] int32: the r-th candidate that is not of the anchor's person; r from 0, within what there is."""
        return self.order[jnp.clip(r + jnp.where(r >= self.start, self.photos, 0), 0, len(self.order) - 1)]


class Layout(NamedTuple):
    """Who is where: the anchors of this device among the candidates.

    Attributes:
      row: [b] int32 global index of each anchor.
      identity: [C] int person ids of the candidates.
      usable: [C] bool, False for what a memory does not hold yet; None: all of them are.
      batch: the photos of the global batch by person.
      memory: the same of the memory, with indices of candidates; None without one.
      rank: [b] int32, the anchor's place among the photos of its person, 0 to photos-1.
      rounds: [] int32, the most positives any anchor of the global batch has.
    """

    row: Array
    identity: Array
    usable: Array | None
    batch: Group
    memory: Group | None
    rank: Array
    rounds: Array

    @property
    def positives(self) -> Array:
        """[b] int32: how many positives each anchor has."""
        return self.batch.photos - 1

    @property
    def negatives(self) -> Array:
        """[b] int32: how many negatives each anchor has."""
        count = self.batch.size - self.batch.photos
        return count if self.memory is None else count + self.memory.size - self.memory.photos

    @property
    def valid(self) -> Array:
        """[b] bool: whether the anchor has a positive and a negative."""
        return (self.positives > 0) & (self.negatives > 0)

    def positive(self, r: Array) -> Array:
        """[b] int32: the r-th positive of each anchor by global index, or -1 past the last."""
        place = self.batch.start + r + (r >= self.rank)
        found = (r >= 0) & (r < self.positives)
        return jnp.where(found, self.batch.order[jnp.where(found, place, 0)], -1)

    def negative(self, r: Array) -> Array:
        """[b] int32: the r-th negative of each anchor by person, those of a memory last, or -1 past the last."""
        index = self.batch.other(r)
        if self.memory is not None:
            before = self.batch.size - self.batch.photos
            index = jnp.where(r < before, index, self.memory.other(r - before))
        return jnp.where((r >= 0) & (r < self.negatives), index, -1)

    def is_different(self) -> Array:
        """[b, C] bool: whether the candidate shows another person than the anchor."""
        different = self.identity[self.row][:, None] != self.identity[None, :]
        return different if self.usable is None else different & self.usable[None, :]

    def is_positive(self) -> Array:
        """[b, C] bool: whether the candidate is another photo of the anchor's person, in the batch."""
        column = jnp.arange(self.identity.shape[0], dtype=self.row.dtype)[None, :]
        same = self.identity[self.row][:, None] == self.identity[None, :]
        return same & (column != self.row[:, None]) & (column < len(self.batch.order))


def varying_zeros(layout: Layout, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Array:
    """[b, *shape] zeros to start a loop with: they vary over devices for shard_map's type check.

    They are made from `photos`, which varies where rows do and where identities do: a device that mines alone has the
    same rows as every other.
    """
    zero = jnp.where(layout.batch.photos >= 0, jnp.zeros((), dtype), jnp.ones((), dtype))
    return jnp.broadcast_to(zero.reshape(-1, *(1 for _ in shape)), (*zero.shape, *shape))


class Triplets(NamedTuple):
    """A list of triplets: at most one an anchor in each round.

    Attributes:
      positive: [r, b] int32 global index of the positive, -1 where the anchor has no triplet in this round.
      negative: [r, b] int32 global index of the negative, -1 likewise.
      rounds: [] int32: rounds at and past this one are not filled in and must not be read.
    """

    positive: Array
    negative: Array
    rounds: Array


def layout_of(row: Array, identity: Array, remembered: Array | None = None, filled: Array | None = None) -> Layout:
    """Sorts the candidates by person, once.

    Args:
      row: [b] int32 global index of each anchor.
      identity: [B] int person ids of the global batch.
      remembered: [m] int person ids of a memory; None without one.
      filled: [m] bool, which of them count.
    """
    size = identity.shape[0]
    index = jnp.arange(size, dtype=jnp.int32)
    order = jnp.argsort(identity, stable=True).astype(jnp.int32)
    ranked = identity[order]
    first = jnp.concatenate([jnp.ones(1, bool), ranked[1:] != ranked[:-1]])
    last = jnp.concatenate([ranked[1:] != ranked[:-1], jnp.ones(1, bool)])
    start = lax.cummax(jnp.where(first, index, 0))
    end = lax.cummin(jnp.where(last, index, size - 1), reverse=True)
    place = jnp.zeros(size, jnp.int32).at[order].set(index, unique_indices=True)
    photos = (end - start + 1)[place]
    batch = Group(order, jnp.full((), size, jnp.int32), start[place][row], photos[row])
    usable, memory, rounds = None, None, jnp.max(photos) - 1
    rank = (place - start[place])[row]
    if remembered is not None and filled is not None:
        memory = _group_of(identity[row], remembered.astype(identity.dtype), filled, offset=size)
        identity = jnp.concatenate([identity, remembered.astype(identity.dtype)])
        usable = jnp.concatenate([jnp.ones(size, bool), filled])
    return Layout(row, identity, usable, batch, memory, rank, rounds)


def _group_of(person: Array, identity: Array, counts: Array, offset: int) -> Group:
    """Those of [m] candidates that count, sorted by person, and where each of the anchors' persons [b] stands."""
    order = jnp.lexsort((identity, ~counts)).astype(jnp.int32)
    size = jnp.sum(counts, dtype=jnp.int32)
    # What does not count may have any id: behind the last that does, the largest keeps the list sorted.
    ranked = jnp.where(jnp.arange(len(order)) < size, identity[order], jnp.iinfo(identity.dtype).max)
    start = jnp.minimum(jnp.searchsorted(ranked, person, side="left").astype(jnp.int32), size)
    end = jnp.minimum(jnp.searchsorted(ranked, person, side="right").astype(jnp.int32), size)
    return Group(order + offset, size, start, end - start)


def squared_distances(rows: Array, columns: Array) -> Array:
    """Squared Euclidean distances as one matrix product: |x|² + |y|² - 2xy.

    Rounding can make the sum slightly negative where x = y; it is clamped at 0, and the gradient passes the clamp, as
    the true distance is never negative.

    Args:
      rows: [m, d] float.
      columns: [n, d] float.

    Returns:
      [m, n], in the dtype of the arguments.
    """
    # Only sums after the product: a compiler that copies this into two loops has no multiplication to fuse into one of
    # them, so both get the same bits, and a minimum is found again by equality.
    # HIGHEST: a GPU would otherwise round the factors to TF32's 10 bits.
    product = jnp.matmul(-2 * rows, columns.T, precision=lax.Precision.HIGHEST)
    distance = jnp.sum(rows * rows, 1)[:, None] + jnp.sum(columns * columns, 1)[None, :] + product
    return distance - lax.stop_gradient(jnp.minimum(distance, 0))


def _first(found: Array) -> Array:
    """[m] int32: the lowest column that is True in each row of [m, n] bool; n-1 where none is, as with NaN."""
    # Faster on a CPU than argmax, which XLA does not vectorise.
    column = jnp.arange(found.shape[1], dtype=jnp.int32)[None, :]
    return jnp.min(jnp.where(found, column, found.shape[1] - 1), axis=1)


def random(layout: Layout, anchors: Array, everyone: Array, key: Array) -> Triplets:
    """One triplet an anchor: its positive and its negative drawn uniformly, each anchor by (key, its global index)."""

    def draw(row: Array, choices: Array) -> Array:
        return jax.random.randint(jax.random.fold_in(key, row), (2,), 0, jnp.maximum(choices, 1), jnp.int32)

    choices = jnp.stack([layout.positives, layout.negatives], 1)
    place = jax.vmap(draw)(layout.row, choices)
    return _one_round(layout, layout.positive(place[:, 0]), layout.negative(place[:, 1]))


def hardest(
    layout: Layout, anchors: Array, everyone: Array, key: Array | None = None, width: int | None = None
) -> Triplets:
    """Batch hard: the farthest positive and the closest negative of each anchor (Hermans et al. 2017, eq. 5)."""
    size = everyone.shape[0]
    # The distances are met `width` columns at a time, while they are in cache: 5 times as fast as going through memory
    # at B=4096 on two cores.
    width = min(size, width or max(1, BLOCK // anchors.shape[0]))
    person = layout.identity[layout.row]

    def improve(i: Array, best: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        far, positive, near, negative = best
        # The last block reaches back over columns already seen, which a strict comparison then leaves as they are.
        first = jnp.minimum(i * width, size - width)
        column = first + jnp.arange(width, dtype=jnp.int32)
        distance = squared_distances(anchors, lax.dynamic_slice_in_dim(everyone, first, width))
        different = person[:, None] != lax.dynamic_slice_in_dim(layout.identity, first, width)[None, :]
        no_positive = different | (layout.row[:, None] == column)
        if layout.usable is not None:
            no_positive |= column >= len(layout.batch.order)
            different &= lax.dynamic_slice_in_dim(layout.usable, first, width)[None, :]
        of_same = jnp.where(no_positive, -jnp.inf, distance)
        of_other = jnp.where(different, distance, jnp.inf)
        farthest, closest = jnp.max(of_same, 1), jnp.min(of_other, 1)
        farther, closer = farthest > far, closest < near
        return (
            jnp.where(farther, farthest, far),
            jnp.where(farther, first + _first(of_same == farthest[:, None]), positive),
            jnp.where(closer, closest, near),
            jnp.where(closer, first + _first(of_other == closest[:, None]), negative),
        )

    infinity = varying_zeros(layout, (), anchors.dtype) + jnp.inf
    index = varying_zeros(layout, (), jnp.int32)
    blocks = -(-size // width)
    _, positive, _, negative = lax.fori_loop(0, blocks, improve, (-infinity, index, infinity, index))
    return _one_round(layout, positive, negative)


def _one_round(layout: Layout, positive: Array, negative: Array) -> Triplets:
    def keep(index: Array) -> Array:
        return jnp.where(layout.valid, index, -1)[None, :]

    return Triplets(keep(positive), keep(negative), jnp.ones((), jnp.int32))


def semi_hard(layout: Layout, anchors: Array, everyone: Array, key: Array | None = None) -> Triplets:
    """FaceNet's: for each (A, P), the closest N with d(A,N) > d(A,P), else the farthest N (Schroff et al. 2015, eq. 4).

    The list has room for every pair, as one person may own the whole batch, but only `rounds` of it are ever touched.
    """
    distance = squared_distances(anchors, everyone)
    # -inf fails every `> d(A,P)`, so that one comparison tells both the person and the distance.
    negative = jnp.where(layout.is_different(), distance, -jnp.inf)
    farthest = _first(negative == jnp.max(negative, 1, keepdims=True))

    def fill(r: Array, listed: tuple[Array, Array]) -> tuple[Array, Array]:
        p = layout.positive(r)
        d_ap = jnp.take_along_axis(distance, jnp.maximum(p, 0)[:, None], axis=1)
        closest = jnp.min(jnp.where(negative > d_ap, negative, jnp.inf), 1, keepdims=True)
        n = jnp.where(closest[:, 0] < jnp.inf, _first(negative == closest), farthest)
        chosen = layout.valid & (p >= 0)
        return listed[0].at[r].set(jnp.where(chosen, p, -1)), listed[1].at[r].set(jnp.where(chosen, n, -1))

    shape = (max(1, len(layout.batch.order) - 1), layout.row.shape[0])
    empty = jnp.swapaxes(varying_zeros(layout, shape[:1], jnp.int32), 0, 1)
    positive, negative_index = lax.fori_loop(0, layout.rounds, fill, (empty, empty))
    return Triplets(positive, negative_index, layout.rounds)


def all_triplets(layout: Layout, distance: Array, margin: Array) -> tuple[Array, Array]:
    """Batch all: every valid triplet with d(A,P) - d(A,N) + α > 0 (Hermans et al. 2017, eq. 8).

    Args:
      layout: who is where.
      distance: [b, C] squared distances.
      margin: [b] α, one an anchor.

    Returns:
      (total, counted): [b] sum of d(A,P) - d(A,N) + α over those triplets of each anchor, and [b] int32, how many they
      are. `total` is differentiable in `distance` and `margin`.
    """
    return _band_sum(layout, distance, margin, False)


def semi_hard_all(layout: Layout, distance: Array, margin: Array) -> tuple[Array, Array]:
    """Those triplets of `all_triplets` with d(A,N) > d(A,P), strictly (Schroff et al. 2015, eq. 4)."""
    return _band_sum(layout, distance, margin, True)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _band_sum(layout, distance, margin, farther_only):
    return _scan_band(layout, distance, margin, farther_only)[:2]


def _band_sum_forward(layout, distance, margin, farther_only):
    total, counted, weight = _scan_band(layout, distance, margin, farther_only)
    return (total, counted), (counted, weight)


def _band_sum_backward(farther_only, residual, cotangent):
    counted, weight = residual
    by_total, _ = cotangent
    return None, by_total[:, None] * weight, by_total * counted.astype(by_total.dtype)


_band_sum.defvjp(_band_sum_forward, _band_sum_backward)


def _scan_band(layout, distance, margin, farther_only):
    """The sums, and [b, C] d(total)/d(distance): how often each photo counts as a positive, less as a negative."""
    different = layout.is_different()
    anchor = jnp.arange(layout.row.shape[0])

    def add(r, carry):
        total, counted, weight = carry
        p = layout.positive(r)
        d_ap = jnp.take_along_axis(distance, jnp.maximum(p, 0)[:, None], axis=1)
        hinge = d_ap - distance + margin[:, None]
        # "Not below" rather than "above": a NaN is counted, and reaches the loss instead of vanishing from it.
        active = different & (p >= 0)[:, None] & ~(hinge <= 0)
        if farther_only:
            active &= ~(distance <= d_ap)
        count = jnp.sum(active, 1, dtype=jnp.int32)
        weight = weight - active.astype(weight.dtype)
        weight = weight.at[anchor, jnp.maximum(p, 0)].add(count.astype(weight.dtype))
        return total + jnp.sum(jnp.where(active, hinge, 0), 1), counted + count, weight

    zero = varying_zeros(layout, (), distance.dtype)
    init = (zero, zero.astype(jnp.int32), varying_zeros(layout, (distance.shape[1],), distance.dtype))
    return lax.fori_loop(0, layout.rounds, add, init)


IndexMiner = Callable[..., Triplets]
Reducer = Callable[[Layout, Array, Array], tuple[Array, Array]]

INDEX_MINERS: dict[str, IndexMiner] = {"random": random, "hardest": hardest, "semi_hard": semi_hard}
REDUCERS: dict[str, Reducer] = {"all": all_triplets, "semi_hard_all": semi_hard_all}
MINERS: dict[str, IndexMiner | Reducer] = {**INDEX_MINERS, **REDUCERS}

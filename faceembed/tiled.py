"""Mining without a table of distances: sums over triplets, and their derivatives, in memory linear in the batch.

The anchors of this device meet the candidates a slab at a time: [rows, tile] distances from one matrix product, used
while they are in cache and forgotten. What a miner chooses, and what `mining` would choose from a whole table, is the
same but for distances that differ by rounding alone.

A sum over triplets is Σ d(A,P) - d(A,N) + α over those that are active, so its derivative needs only how often each
candidate is an active negative, and each positive an active one. With W[a, n] the number of active triplets of anchor a
with the negative n, and w[a, p] the number with the positive p,

    ∂/∂a = 2 (W E - w P)      ∂/∂n = 2 (Wᵀ A - n Σ_a W[a, n])      ∂/∂p = 2 w (p - a).

Both are made in the sweep that makes the sum, three matrix products in all, and kept as [b, d] and [C, d]: the backward
pass scales them. This needs one cotangent for the sum rather than one an anchor, so a sum is a scalar here.

No collective may enter a function with a derivative of its own: under shard_map that would be wrong by the number of
devices.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from faceembed import mining

SLICES = 16
"""Parts of a slab that are folded together, element by element, before anything is reduced along a row: XLA vectorises the
first on a CPU and not the second. Ten times as fast there, and as good on a GPU."""

THRESHOLDS = 64
"""Positives of an anchor that one sweep over the candidates takes; people with more photos take several sweeps."""


Zeros = Callable[..., Array]
"""(shape, dtype) → zeros."""


class Sizes(NamedTuple):
    """How many distances are looked at together."""

    rows: int
    tile: int


def sizes(anchors: int, candidates: int, tile: int | None = None) -> Sizes:
    """Rows and candidates of a slab: on a CPU half a MiB of float32, which stays in a core's cache; on a GPU 16 MiB.

    At once a miner holds up to 24 times as much: semi_hard's four arrays [THRESHOLDS, rows, lanes] are 16 times.

    Args:
      anchors: b.
      candidates: C.
      tile: candidates a slab, rounded up to whole lanes; None chooses.
    """
    on_cpu = jax.default_backend() == "cpu"
    if tile is None:
        tile = 256 if on_cpu else 4096
    tile = min(tile, candidates)
    if tile > SLICES:
        tile += -tile % SLICES
    lanes = tile // _slices(tile)
    rows = max(1, (2**17 if on_cpu else 2**22) // (SLICES * lanes))
    return Sizes(min(rows, anchors), tile)


def band_sum(
    layout: mining.Layout,
    anchors: Array,
    candidates: Array,
    margin: Array,
    *,
    farther_only: bool,
    tile: int | None = None,
) -> tuple[Array, Array]:
    """The sum of d(A,P) - d(A,N) + α over the valid triplets where it is positive: miners `all` and `semi_hard_all`.

    Args:
      layout: who is where.
      anchors: [b, d] float.
      candidates: [C, d] float.
      margin: [b] α, one an anchor.
      farther_only: only triplets with d(A,N) > d(A,P).
      tile: see `sizes`.

    Returns:
      (total [], counted [b] int32): the sum over all anchors here, differentiable in `anchors`, `candidates` and
      `margin`; and how many triplets each anchor has in it.
    """
    return _band(layout, anchors, candidates, margin, farther_only, sizes(len(anchors), len(candidates), tile))


def semi_hard(
    layout: mining.Layout, anchors: Array, candidates: Array, margin: Array, *, tile: int | None = None
) -> tuple[Array, Array, Array, Array, Array]:
    """The sum of max(d(A,P) - d(A,N) + α, 0) over FaceNet's triplets, see `mining.semi_hard`.

    Args: as for `band_sum`.

    Returns:
      (total [], active [b], chosen [b], d_ap [b], d_an [b]): the sum over all anchors here, differentiable as that of
      `band_sum`; and for each anchor how many triplets have a positive hinge, how many there are, and the means of
      their distances.
    """
    return _semi_hard(layout, anchors, candidates, margin, sizes(len(anchors), len(candidates), tile))


def mean_distances(layout: mining.Layout, anchors: Array, candidates: Array) -> tuple[Array, Array]:
    """Each anchor's mean d(A,P) and mean d(A,N) over all its positives and negatives, [b] each, 0 without any."""
    weight = jnp.ones(len(candidates), anchors.dtype) if layout.usable is None else layout.usable.astype(anchors.dtype)
    weighted = weight[:, None] * candidates
    square = jnp.sum(anchors * anchors, 1)
    # Σ_c |a - c|² = C|a|² - 2 a·Σc + Σ|c|²; that of the anchor with itself is 0.
    to_all = jnp.matmul(-2 * anchors, jnp.sum(weighted, 0), precision=lax.Precision.HIGHEST)
    everyone = jnp.sum(weight) * square + to_all + jnp.sum(weighted * candidates)

    def of_person(group: mining.Group, rounds: Array) -> Array:
        def add(r: Array, total: Array) -> Array:
            index = group.order[jnp.clip(group.start + r, 0, len(group.order) - 1)]
            return total + jnp.where(r < group.photos, _direct(anchors, candidates[index]), 0)

        return lax.fori_loop(0, rounds, add, jnp.zeros_like(square))

    d_ap = of_person(layout.batch, layout.rounds + 1)
    own = d_ap
    if layout.memory is not None:
        own += of_person(layout.memory, jnp.max(layout.memory.photos))
    return (
        jnp.where(layout.positives > 0, d_ap / jnp.maximum(layout.positives, 1), 0),
        jnp.where(layout.negatives > 0, (everyone - own) / jnp.maximum(layout.negatives, 1), 0),
    )


def _direct(a: Array, b: Array) -> Array:
    return jnp.sum((a - b) ** 2, 1)


# --- Rows of anchors, slabs of candidates


class _Rows(NamedTuple):
    """Some of the anchors; `layout` is theirs."""

    layout: mining.Layout
    embedding: Array
    margin: Array
    person: Array
    square: Array


class _Slabs(NamedTuple):
    """The candidates, filled up to whole slabs with some that are not usable."""

    embedding: Array
    person: Array
    square: Array
    usable: Array


def _fill(x: Array, size: int, value: int = 0) -> Array:
    """[n, …] → [m·size, …], the first multiple that is not smaller."""
    return jnp.pad(x, ((0, -len(x) % size), *((0, 0) for _ in range(x.ndim - 1))), constant_values=value)


def _slabs(layout: mining.Layout, candidates: Array, tile: int) -> _Slabs:
    usable = jnp.ones(len(candidates), bool) if layout.usable is None else layout.usable
    square = jnp.sum(candidates * candidates, 1)
    return _Slabs(*(_fill(x, tile) for x in (candidates, layout.identity, square, usable)))


def _rows(layout: mining.Layout, anchors: Array, margin: Array, size: int) -> tuple[int, Callable[[Array], _Rows]]:
    """(how many groups of rows, the i-th of them), filled up to whole groups with anchors without a positive."""
    # An anchor with nobody to be told from has no triplet: as if it had no positives.
    photos = _fill(jnp.where(layout.valid, layout.batch.photos, 1), size, 1)
    row, rank, start = (_fill(x, size) for x in (layout.row, layout.rank, layout.batch.start))
    embedding, margins = _fill(anchors, size), _fill(margin, size)
    person, square = layout.identity[row], jnp.sum(embedding * embedding, 1)

    def group(i: Array) -> _Rows:
        cut = lambda x: lax.dynamic_slice_in_dim(x, i * size, size)  # noqa: E731
        batch = layout.batch._replace(start=cut(start), photos=cut(photos))
        here = layout._replace(row=cut(row), rank=cut(rank), batch=batch)
        return _Rows(here, *(cut(x) for x in (embedding, margins, person, square)))

    return len(row) // size, group


def _distances(rows: _Rows, slabs: _Slabs, j: Array, tile: int) -> tuple[list[Array], Array]:
    """(squared distances [rows, tile] in slices, infinite where there is no negative; the slab's [tile, d] embeddings)."""
    cut = lambda x: lax.dynamic_slice_in_dim(x, j * tile, tile)  # noqa: E731
    slab = cut(slabs.embedding)
    product = jnp.matmul(-2 * rows.embedding, slab.T, precision=lax.Precision.HIGHEST)
    distance = rows.square[:, None] + cut(slabs.square)[None, :] + product
    negative = (rows.person[:, None] != cut(slabs.person)[None, :]) & cut(slabs.usable)[None, :]
    # Not below 0, as in `mining.squared_distances`; written so that a NaN stays one.
    distance = jnp.where(negative, jnp.where(distance < 0, 0, distance), jnp.inf)
    lanes = tile // _slices(tile)
    return [distance[:, s : s + lanes] for s in range(0, tile, lanes)], slab


def _slices(tile: int) -> int:
    """Into how many parts [rows, lanes] a slab is cut: lane l of part s is its column s·lanes + l."""
    return next(n for n in (SLICES, 8, 4, 2, 1) if tile % n == 0)


def _fold(combine: Callable[[Array, Array], Array], parts: list[Array]) -> Array:
    """The parts combined two by two."""
    while len(parts) > 1:
        pairs = [combine(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]


def _positives(rows: _Rows, candidates: Array, first: Array, rounds: Array, zeros: Zeros) -> Array:
    """[THRESHOLDS, rows] d(a, p) of the positives from `first` on, -inf where there is none."""

    def fill(r: Array, d_ap: Array) -> Array:
        p = rows.layout.positive(first + r)
        return d_ap.at[r].set(jnp.where(p >= 0, _direct(rows.embedding, candidates[jnp.maximum(p, 0)]), -jnp.inf))

    return lax.fori_loop(0, rounds, fill, zeros((THRESHOLDS, len(rows.person)), candidates.dtype) - jnp.inf)


def _zeros(layout: mining.Layout) -> Zeros:
    """Zeros to start a loop with, which vary over devices for shard_map's type check."""
    zero = mining.varying_zeros(layout, (), jnp.int32)[0]
    return lambda shape, dtype: jnp.broadcast_to(zero.astype(dtype), shape)


def _sweeps(layout: mining.Layout) -> Array:
    return -(-layout.rounds // THRESHOLDS)


# --- all, semi_hard_all


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _band(layout, anchors, candidates, margin, farther_only, size):
    total, counted, _, _ = _sweep_band(layout, anchors, candidates, margin, farther_only, size, False)
    return total, counted


def _band_forward(layout, anchors, candidates, margin, farther_only, size):
    total, *residual = _sweep_band(layout, anchors, candidates, margin, farther_only, size, True)
    return (total, residual[0]), residual


def _band_backward(farther_only, size, residual, cotangent):
    counted, by_anchors, by_candidates = residual
    by_total, _ = cotangent
    return None, by_total * by_anchors, by_total * by_candidates, by_total * counted.astype(by_total.dtype)


_band.defvjp(_band_forward, _band_backward)


def _sweep_band(layout, anchors, candidates, margin, farther_only, size, with_gradient):
    """(total [], counted [b], d(total)/d(anchors) [b, d], d(total)/d(candidates) [C, d]); the last two 0 unless asked."""
    dtype, zeros = anchors.dtype, _zeros(layout)
    slabs = _slabs(layout, candidates, size.tile)
    groups, group = _rows(layout, anchors, margin, size.rows)
    lanes = size.tile // _slices(size.tile)
    dim = anchors.shape[1] if with_gradient else 0

    def active(x, d_ap, t):
        # "Not below" rather than "above": a NaN is counted, and reaches the loss instead of vanishing from it.
        found = ~(t - x <= 0)
        return found & ~(x <= d_ap) if farther_only else found

    def of_rows(i, carry):
        rows = group(i)

        def sweep(c, carry):
            total, counted, by_rows, by_candidates = carry
            first = c * THRESHOLDS
            rounds = jnp.clip(layout.rounds - first, 0, THRESHOLDS)
            d_ap = _positives(rows, candidates, first, rounds, zeros)

            def slab(j, carry):
                hinge, counts, by_rows, by_candidates = carry
                distance, embedding = _distances(rows, slabs, j, size.tile)

                def add_hinge(r, hinge):
                    near, t = d_ap[r][:, None], (d_ap[r] + rows.margin)[:, None]
                    return hinge + _fold(jnp.add, [jnp.where(active(x, near, t), t - x, 0) for x in distance])

                def count(r, counts):
                    near, t = d_ap[r][:, None], (d_ap[r] + rows.margin)[:, None]
                    return counts.at[r].add(_fold(jnp.add, [active(x, near, t).astype(jnp.int32) for x in distance]))

                hinge = lax.fori_loop(0, rounds, add_hinge, hinge)
                counts = lax.fori_loop(0, rounds, count, counts)
                if with_gradient:
                    whole = jnp.concatenate(distance, 1)

                    def weigh(four, weight):
                        for k in range(4):
                            near = d_ap[4 * four + k][:, None]
                            weight += active(whole, near, near + rows.margin[:, None]).astype(dtype)
                        return weight

                    weight = lax.fori_loop(0, -(-rounds // 4), weigh, zeros(whole.shape, dtype))
                    product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
                    by_rows += product(weight, embedding)
                    by_slab = 2 * (product(weight.T, rows.embedding) - jnp.sum(weight, 0)[:, None] * embedding)
                    place = j * size.tile
                    by_slab += lax.dynamic_slice_in_dim(by_candidates, place, size.tile)
                    by_candidates = lax.dynamic_update_slice_in_dim(by_candidates, by_slab, place, 0)
                return hinge, counts, by_rows, by_candidates

            init = (
                zeros((size.rows, lanes), dtype),
                zeros((THRESHOLDS, size.rows, lanes), jnp.int32),
                by_rows,
                by_candidates,
            )
            hinge, lane_counts, by_rows, by_candidates = lax.fori_loop(0, len(slabs.person) // size.tile, slab, init)
            counts = jnp.sum(lane_counts, 2, dtype=jnp.int32)

            def pull(r, carry):
                by_rows, by_candidates = carry
                p = rows.layout.positive(first + r)
                weight = jnp.where(p >= 0, counts[r], 0).astype(dtype)[:, None]
                positive = candidates[jnp.maximum(p, 0)]
                by_positive = 2 * weight * (positive - rows.embedding)
                return by_rows - weight * positive, by_candidates.at[jnp.maximum(p, 0)].add(by_positive)

            if with_gradient:
                by_rows, by_candidates = lax.fori_loop(0, rounds, pull, (by_rows, by_candidates))
            return total + jnp.sum(hinge), counted + jnp.sum(counts, 0, dtype=jnp.int32), by_rows, by_candidates

        total, counted, by_anchors, by_candidates = carry
        init = (total, zeros(size.rows, jnp.int32), zeros((size.rows, dim), dtype), by_candidates)
        total, here, by_rows, by_candidates = lax.fori_loop(0, _sweeps(layout), sweep, init)
        put = lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, i * size.rows, 0)  # noqa: E731
        return total, put(counted, here), put(by_anchors, 2 * by_rows), by_candidates

    length = groups * size.rows
    init = (
        zeros((), dtype),
        zeros(length, jnp.int32),
        zeros((length, dim), dtype),
        zeros((len(slabs.person), dim), dtype),
    )
    total, counted, by_anchors, by_candidates = lax.fori_loop(0, groups, of_rows, init)
    return total, counted[: len(anchors)], by_anchors[: len(anchors)], by_candidates[: len(candidates)]


# --- semi_hard


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _semi_hard(layout, anchors, candidates, margin, size):
    return _sweep_semi_hard(layout, anchors, candidates, margin, size, False)[0]


def _semi_hard_forward(layout, anchors, candidates, margin, size):
    found, by_anchors, by_candidates = _sweep_semi_hard(layout, anchors, candidates, margin, size, True)
    return found, (found[1], by_anchors, by_candidates)


def _semi_hard_backward(size, residual, cotangent):
    active, by_anchors, by_candidates = residual
    by_total = cotangent[0]
    return None, by_total * by_anchors, by_total * by_candidates, by_total * active.astype(by_total.dtype)


_semi_hard.defvjp(_semi_hard_forward, _semi_hard_backward)


def _sweep_semi_hard(layout, anchors, candidates, margin, size, with_gradient):
    """((total [], active [b], chosen [b], d_ap [b], d_an [b]), and its derivatives [b, d] and [C, d] if asked)."""
    dtype, zeros = anchors.dtype, _zeros(layout)
    slabs = _slabs(layout, candidates, size.tile)
    groups, group = _rows(layout, anchors, margin, size.rows)
    slices = _slices(size.tile)
    lanes = size.tile // slices
    many = (THRESHOLDS, size.rows, lanes)

    def of_rows(i, carry):
        rows = group(i)

        def sweep(c, sums):
            first = c * THRESHOLDS
            rounds = jnp.clip(layout.rounds - first, 0, THRESHOLDS)
            d_ap = _positives(rows, candidates, first, rounds, zeros)

            def slab(j, carry):
                # Each lane's closest candidate so far that is farther than the positive, and its slice over all slabs;
                # `least` and `at` are room for the same within this slab. A loop with one array in its hands writes it
                # in place; with two, XLA copies both.
                closest, where, least, at, farthest, where_far = carry
                distance, _ = _distances(rows, slabs, j, size.tile)

                def find(r, least):
                    near = d_ap[r][:, None]
                    return least.at[r].set(_fold(jnp.minimum, [jnp.where(x > near, x, jnp.inf) for x in distance]))

                least = lax.fori_loop(0, rounds, find, least)

                def locate(r, at):
                    return at.at[r].set(_first_slice(distance, least[r]))

                at = lax.fori_loop(0, rounds, locate, at)

                def remember(r, where):
                    return where.at[r].set(jnp.where(least[r] < closest[r], j * slices + at[r], where[r]))

                where = lax.fori_loop(0, rounds, remember, where)
                closest = lax.fori_loop(0, rounds, lambda r, x: x.at[r].set(jnp.minimum(x[r], least[r])), closest)

                finite = [jnp.where(x < jnp.inf, x, -jnp.inf) for x in distance]
                most = _fold(jnp.maximum, finite)
                where_far = jnp.where(most > farthest, j * slices + _first_slice(finite, most), where_far)
                return closest, where, least, at, jnp.maximum(farthest, most), where_far

            init = (
                zeros(many, dtype) + jnp.inf,
                zeros(many, jnp.int32),
                zeros(many, dtype),
                zeros(many, jnp.int32),
                zeros(many[1:], dtype) - jnp.inf,
                zeros(many[1:], jnp.int32),
            )
            found = lax.fori_loop(0, len(slabs.person) // size.tile, slab, init)
            closest, where, _, _, farthest, where_far = found
            far = _first_column(farthest, where_far, jnp.max(farthest, 1), lanes)

            def add(r, sums):
                total, active, sum_ap, sum_an, by_rows, by_candidates = sums
                p = rows.layout.positive(first + r)
                chosen = p >= 0
                best = jnp.min(closest[r], 1)
                n = jnp.where(best < jnp.inf, _first_column(closest[r], where[r], best, lanes), far)
                p, n = jnp.where(chosen, p, 0), jnp.where(chosen, n, 0)
                to_positive, to_negative = rows.embedding - candidates[p], rows.embedding - candidates[n]
                near, other = jnp.sum(to_positive**2, 1), jnp.sum(to_negative**2, 1)
                hinge = jnp.where(chosen, near - other + rows.margin, 0)
                total += jnp.sum(jnp.maximum(hinge, 0))
                if with_gradient:
                    weight = jnp.where(chosen & ~(hinge <= 0), 2, 0).astype(dtype)[:, None]
                    by_positive, by_negative = -weight * to_positive, weight * to_negative
                    by_rows -= by_positive + by_negative
                    # One scatter for both: XLA's is a serial loop on a CPU.
                    index = jnp.concatenate([p, n])
                    by_candidates = by_candidates.at[index].add(jnp.concatenate([by_positive, by_negative]))
                active += (hinge > 0).astype(jnp.int32)
                sum_ap, sum_an = (s + jnp.where(chosen, d, 0) for s, d in ((sum_ap, near), (sum_an, other)))
                return total, active, sum_ap, sum_an, by_rows, by_candidates

            return lax.fori_loop(0, rounds, add, sums)

        total, active, sum_ap, sum_an, by_anchors, by_candidates = carry
        by_rows = zeros((size.rows, by_anchors.shape[1]), dtype)
        zero = zeros(size.rows, dtype)
        init = (total, zero.astype(jnp.int32), zero, zero, by_rows, by_candidates)
        total, *here, by_candidates = lax.fori_loop(0, _sweeps(layout), sweep, init)
        put = lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, i * size.rows, 0)  # noqa: E731
        return total, *map(put, (active, sum_ap, sum_an, by_anchors), here), by_candidates

    length, dim = groups * size.rows, anchors.shape[1] if with_gradient else 0
    zero = zeros(length, dtype)
    init = (zeros((), dtype), zero.astype(jnp.int32), zero, zero, zeros((length, dim), dtype))
    by_candidates = zeros((len(candidates), dim), dtype)
    total, *per_anchor, by_candidates = lax.fori_loop(0, groups, of_rows, (*init, by_candidates))
    active, sum_ap, sum_an, by_anchors = (x[: len(anchors)] for x in per_anchor)
    chosen = jnp.where(layout.valid, layout.positives, 0)
    d_ap, d_an = (s / jnp.maximum(chosen, 1) for s in (sum_ap, sum_an))
    return (total, active, chosen, d_ap, d_an), by_anchors, by_candidates


def _first_slice(parts: list[Array], value: Array) -> Array:
    """[rows, lanes] int32: the first of the parts that equals `value` [rows, lanes]."""
    return _fold(jnp.minimum, [jnp.where(x == value, s, len(parts)).astype(jnp.int32) for s, x in enumerate(parts)])


def _first_column(values: Array, place: Array, value: Array, lanes: int) -> Array:
    """[rows] int32: the lowest candidate whose [rows, lanes] value is `value` [rows]; `place` is its slice over all."""
    column = place * lanes + jnp.arange(lanes, dtype=jnp.int32)
    return jnp.min(jnp.where(values == value[:, None], column, jnp.iinfo(jnp.int32).max), 1)

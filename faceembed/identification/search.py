"""Exact nearest rows of a gallery that lies on the devices.

The squared distance |x-t|² = |x|² - 2 (x·t - |t|²/2) is smallest where the *score* x·t - |t|²/2 is largest. Scores are a
matrix product, and quick; but large numbers cancel in them, so that they cannot tell apart rows which are almost equally
near. Therefore:

1. *Screen*: scores are computed for a tile of rows at a time, and only the best of each `BLOCK` rows is kept. Nothing has
   ever the size probes × rows.
2. *Rank*: the rows of the `k + SPARE` best blocks are fetched, and Σ(x-t)² is computed for each as it stands.
3. *Prove*: no row elsewhere has a better score than the best block left out. Where by that, and by a bound on how scores
   are rounded, such a row might be as near as the k-th row found, the probe is not settled, and Σ(x-t)² is computed for
   every row. That takes some three times as long for one probe, and is rare: it needs more than `SPARE` blocks with rows
   as near as the k-th (copies of one photograph, say), or vectors far longer than the differences between them.

So what is found is always what sorting all rows by (Σ(x-t)² in float32, row) would give, whatever the blocks and tiles,
and however many devices share the rows.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from faceembed.mesh import DATA

BLOCK = 128
"""Rows of which the screen keeps the best score."""
SPARE = 3
"""Blocks ranked beyond k, so that rows almost as near as the k-th seldom leave a probe unsettled."""
BATCH = 256
"""Probes searched together at most."""
CHUNK = 2**14
"""Rows checked or written together at most."""
GROWTH = 1.5
"""How many times its old capacity a matrix that grows has at least."""


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """A gallery on the devices. `write` consumes it: from then on only the Matrix that it returns may be used.

    Attributes:
      vectors: [capacity, d] float32. Row r is the (r // D)-th of device r % D, of D devices that share them: all have equal
        work, and no row moves when the capacity grows.
      bias: [capacity] float32, -|t|²/2, or -inf where there is no vector (yet, or any more).
      count: one more than the highest row ever written: where to append.
      mesh: its axis "data" divides the rows; None for one device.
    """

    vectors: Array
    bias: Array
    count: int
    mesh: Mesh | None = None

    @property
    def capacity(self) -> int:
        """Rows that there is memory for."""
        return self.vectors.shape[0]

    @property
    def dim(self) -> int:
        """Numbers in a vector."""
        return self.vectors.shape[1]


def place(vectors: np.ndarray, *, capacity: int | None = None, mesh: Mesh | None = None) -> Matrix:
    """Puts vectors on the devices.

    Args:
      vectors: [n, d] finite floats, of any length; n may be 0. Only a piece of a memory map is in memory at a time.
      capacity: rows to have memory for; n by default. It is rounded up to a multiple of `BLOCK` rows a device.
      mesh: its axis "data" shall divide the rows; None for the default device.

    Returns:
      The matrix, in whose row i is vectors[i].

    Raises:
      ValueError: vectors have another shape or are not finite floats, or the capacity is less than n.
    """
    vectors = _checked(vectors, "vectors", None)
    n, d = vectors.shape
    if capacity is not None and capacity < n:
        raise ValueError(f"capacity is {capacity}, and there are {n} vectors. Give {n} or more, or leave it out.")
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(DATA))
    size = _rounded(n if capacity is None else capacity, mesh)
    full = jnp.zeros((size, d), jnp.float32, device=sharding)
    bias = jnp.full(size, -jnp.inf, jnp.float32, device=sharding)
    return _put(Matrix(full, bias, 0, mesh), np.arange(n), vectors)


def write(matrix: Matrix, rows: np.ndarray, vectors: np.ndarray | None) -> Matrix:
    """Overwrites, appends or removes rows, in place; `matrix` itself must not be used afterwards.

    Args:
      matrix: what to change. Where a row lies beyond its capacity it grows, to 1.5 times that or more.
      rows: [m] int, from 0, in any order. Of a row that is named twice the last vector counts.
      vectors: [m, d] finite floats; or None, which removes the rows: they are not found any more, and may be written again.

    Returns:
      The changed matrix.

    Raises:
      ValueError: shapes or types do not fit, or a row shall be removed that was never there. Nothing is changed then.
    """
    rows = np.asarray(rows)
    if rows.ndim != 1 or not (np.issubdtype(rows.dtype, np.integer) or rows.size == 0):
        raise ValueError(
            f"rows are {rows.dtype} of shape {list(rows.shape)}, not integers [m]. Give row numbers from 0."
        )
    if rows.size and rows.min() < 0:
        raise ValueError(f"row {rows.min()} is negative. Rows are numbered from 0; append at {matrix.count}.")
    if vectors is None:
        if rows.size and rows.max() >= matrix.count:
            raise ValueError(
                f"row {rows.max()} was never written, so that it cannot be removed: there are {matrix.count} rows. "
                "Give rows below that."
            )
    else:
        vectors = _checked(vectors, "vectors", matrix.dim)
        if len(vectors) != len(rows):
            raise ValueError(f"there are {len(rows)} rows and {len(vectors)} vectors. Give a vector for each row.")
    rows = rows.astype(np.int64)
    if (np.diff(rows) <= 0).any():
        # Which of two writes to a row comes last is not defined on a device.
        last = len(rows) - 1 - np.unique(rows[::-1], return_index=True)[1]
        rows, vectors = rows[last], None if vectors is None else vectors[last]
    return _put(matrix, rows, vectors)


def nearest(matrix: Matrix, probes: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of each probe, exactly.

    "Exactly" means: the first k of all rows when they are sorted by (distance, row), with the distance Σ(x-t)² computed in
    float32. Computed and true distances differ by rounding alone, by less than 1e-6 of themselves, so that only rows whose
    true distances are as close as that may change places. Rows with equal vectors have equal distances.

    Compiled once for each (capacity, k, number of probes rounded up to a power of two, at most `BATCH`).

    Args:
      matrix: the gallery.
      probes: [n, d] finite floats, of any length; n may be 0.
      k: how many, from 1; there may be fewer rows.

    Returns:
      (rows, distances): [n, k] int64, the nearest first, ties in the order of rows, and [n, k] float32, the squared
      Euclidean distances; -1 and inf where the gallery has fewer than k vectors.

    Raises:
      ValueError: shapes or types do not fit, or k is less than 1.
    """
    probes = _checked(probes, "probes", matrix.dim)
    if not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k is {k!r}. Give how many rows to find for a probe, 1 or more.")
    rows = np.full((len(probes), k), -1, np.int64)
    distances = np.full((len(probes), k), np.inf, np.float32)
    settled = np.zeros(len(probes), bool)
    for search in (_screened, _every):
        left = np.flatnonzero(~settled)
        batches = [left[start : start + BATCH] for start in range(0, len(left), BATCH)]
        # All are under way before the first is waited for.
        pending = [_start(search, matrix, probes[batch], min(int(k), matrix.capacity)) for batch in batches]
        for batch, (row, distance, sure) in zip(batches, jax.device_get(pending), strict=True):
            rows[batch, : row.shape[1]] = row[: len(batch)]
            distances[batch, : row.shape[1]] = distance[: len(batch)]
            settled[batch] = sure[: len(batch)]
    return rows, distances


def _checked(vectors: np.ndarray, name: str, d: int | None) -> np.ndarray:
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or vectors.shape[1] < 1 or (d is not None and vectors.shape[1] != d):
        wanted = "[n, d]" if d is None else f"[n, {d}] as the gallery"
        raise ValueError(f"{name} have shape {list(vectors.shape)}, not {wanted}. Give one embedding a row.")
    if not np.issubdtype(vectors.dtype, np.floating):
        raise ValueError(f"{name} are {vectors.dtype}, not floats. Give embeddings in float32.")
    for start in range(0, len(vectors), CHUNK):
        with np.errstate(over="ignore", invalid="ignore"):
            piece = vectors[start : start + CHUNK].astype(np.float32, copy=False)
            square = np.einsum("nd,nd->n", piece, piece)
        # 4: so that the square of a sum of two is finite, too.
        bad = np.flatnonzero(~(square < np.finfo(np.float32).max / 4))
        if bad.size:
            row = start + bad[0]
            found = "too long for float32, 9e18 or more" if np.isfinite(vectors[row]).all() else "not finite"
            raise ValueError(f"{name}[{row}] is {found}. Leave it out, or mend what computed it.")
    return vectors


def _put(matrix: Matrix, rows: np.ndarray, vectors: np.ndarray | None) -> Matrix:
    """Writes rows that are all different."""
    top = int(rows.max(initial=-1)) + 1
    full, bias = matrix.vectors, matrix.bias
    if top > matrix.capacity:
        full, bias = _grown(
            full, bias, _rounded(max(top, math.ceil(GROWTH * matrix.capacity)), matrix.mesh), matrix.mesh
        )
    for start in range(0, len(rows), CHUNK):
        piece = rows[start : start + CHUNK]
        where = np.full(_power_of_two(len(piece)), len(bias), np.int32)  # those beyond the last row are written nowhere
        where[: len(piece)] = piece
        if vectors is None:
            bias = _removed(bias, where, matrix.mesh)
        else:
            new = np.zeros((len(where), matrix.dim), np.float32)
            new[: len(piece)] = vectors[start : start + CHUNK]
            full, bias = _overwritten(full, bias, where, new, matrix.mesh)
            if len(rows) > CHUNK:
                bias.block_until_ready()  # or the pieces that wait would take as much memory as the gallery
    return dataclasses.replace(matrix, vectors=full, bias=bias, count=max(matrix.count, top))


def _power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


def _rounded(capacity: int, mesh: Mesh | None) -> int:
    unit = BLOCK * _sharing(mesh)
    return max(1, math.ceil(capacity / unit)) * unit


# --- On the devices


def _sharing(mesh: Mesh | None) -> int:
    """How many devices share the rows."""
    return 1 if mesh is None else mesh.shape[DATA]


def _each(
    function: Callable[..., Any], mesh: Mesh | None, *, divided: Iterable[bool], results: Any
) -> Callable[..., Any]:
    """The function of every device's share of the arguments that are divided, and of the others as they are."""
    if mesh is None:
        return function
    specs = tuple(PartitionSpec(DATA) if share else PartitionSpec() for share in divided)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=results, check_vma=False)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _grown(vectors: Array, bias: Array, capacity: int, mesh: Mesh | None) -> tuple[Array, Array]:
    more = (capacity - bias.shape[0]) // _sharing(mesh)

    def grown(vectors: Array, bias: Array) -> tuple[Array, Array]:
        return jnp.pad(vectors, ((0, more), (0, 0))), jnp.pad(bias, (0, more), constant_values=-jnp.inf)

    return _each(grown, mesh, divided=(True, True), results=PartitionSpec(DATA))(vectors, bias)


def _place_of(where: Array, bias: Array, mesh: Mesh | None) -> Array:
    """Where rows of the gallery are in this device's share; beyond its end if another device has them."""
    if mesh is None:
        return where
    devices = mesh.shape[DATA]
    return jnp.where(where % devices == lax.axis_index(DATA), where // devices, bias.shape[0])


@functools.partial(jax.jit, static_argnums=4, donate_argnums=(0, 1))
def _overwritten(vectors: Array, bias: Array, where: Array, new: Array, mesh: Mesh | None) -> tuple[Array, Array]:
    def overwritten(vectors: Array, bias: Array, where: Array, new: Array) -> tuple[Array, Array]:
        place = _place_of(where, bias, mesh)
        half = jnp.sum(new * new, 1) / 2
        return vectors.at[place].set(new, mode="drop"), bias.at[place].set(-half, mode="drop")

    divided = (True, True, False, False)
    return _each(overwritten, mesh, divided=divided, results=PartitionSpec(DATA))(vectors, bias, where, new)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def _removed(bias: Array, where: Array, mesh: Mesh | None) -> Array:
    def removed(bias: Array, where: Array) -> Array:
        return bias.at[_place_of(where, bias, mesh)].set(-jnp.inf, mode="drop")

    return _each(removed, mesh, divided=(True, False), results=PartitionSpec(DATA))(bias, where)


class Plan(NamedTuple):
    """How the work is divided; what is found does not depend on it.

    Attributes:
      tile: rows screened together, at most.
      together: probes ranked together.
    """

    tile: int
    together: int


def plan(platform: str, probes: int, d: int, k: int) -> Plan:
    """What is quick: on a CPU by measurement (two cores), elsewhere by the size of the pieces."""
    if platform == "cpu":
        # The scores of a tile stay in the second-level cache.
        return Plan(tile=min(max(2**18 // probes, 2048), 16384), together=1)
    # Few and large kernels: 16 MB of scores; 64 MB of vectors fetched.
    return Plan(tile=2**22 // probes, together=max(1, 2**24 // ((k + SPARE) * BLOCK * d)))


def _start(search: Callable[..., Any], matrix: Matrix, probes: np.ndarray, k: int) -> tuple[Array, Array, Array]:
    """Sets `_screened` or `_every` to work on a batch."""
    padded = np.zeros((_power_of_two(len(probes)), matrix.dim), np.float32)
    padded[: len(probes)] = probes
    (platform,) = {device.platform for device in matrix.bias.devices()}
    how = plan(platform, len(padded), matrix.dim, k)
    return search(matrix.vectors, matrix.bias, np.int32(matrix.count), padded, k, matrix.mesh, how)


def _distances(x: Array, t: Array, bias: Array) -> Array:
    """Σ(x-t)², and inf where there is no t."""
    return jnp.where(bias == -jnp.inf, jnp.inf, jnp.sum(jnp.square(x - t), -1))


def _first(distance: Array, row: Array, k: int) -> tuple[Array, Array]:
    """The k nearest, of distances in the order of rows: `top_k` keeps that order among equals."""
    negative, place = lax.top_k(-distance, min(k, len(row)))
    return -negative, row[place]


def _joined(distance: Array, row: Array, k: int, mesh: Mesh | None) -> tuple[Array, Array]:
    """The nearest of all devices' nearest: ([n, k] rows of the gallery, -1 where there is none, [n, k] distances)."""
    if mesh is not None:
        row = row * mesh.shape[DATA] + lax.axis_index(DATA)
        everyones = lax.all_gather((distance, row), DATA, axis=1, tiled=True)
        distance, row = (x[:, :k] for x in lax.sort(everyones, dimension=1, num_keys=2))
    return jnp.where(distance == jnp.inf, -1, row), distance


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _screened(
    vectors: Array, bias: Array, count: Array, probes: Array, k: int, mesh: Mesh | None, how: Plan
) -> tuple[Array, Array, Array]:
    """([n, k] rows, [n, k] distances, [n] bool: whether they are proved to be the nearest)."""

    def screened(vectors: Array, bias: Array, count: Array, probes: Array) -> tuple[Array, Array, Array]:
        size, blocks = bias.shape[0], bias.shape[0] // BLOCK
        kept = min(k + SPARE, blocks)
        score, block = _best_blocks(vectors, bias, count, probes, min(kept + 1, blocks), mesh, how)
        missed = score[:, kept] if kept < blocks else jnp.full(probes.shape[0], -jnp.inf)
        places = jnp.arange(size).reshape(blocks, BLOCK)

        def rank(one: tuple[Array, Array]) -> tuple[Array, Array]:
            probe, block = one
            distance = _distances(probe, vectors.reshape(blocks, BLOCK, -1)[block], bias.reshape(blocks, BLOCK)[block])
            return _first(distance.reshape(-1), places[block].reshape(-1), k)

        together = min(how.together, probes.shape[0])
        distance, place = lax.map(rank, (probes, jnp.sort(block[:, :kept], 1)), batch_size=together)
        row, distance = _joined(distance, place, k, mesh)
        missed = missed if mesh is None else lax.pmax(missed, DATA)
        return row, distance, _is_proved(probes, distance[:, -1], missed)

    divided = (True, True, False, False)
    return _each(screened, mesh, divided=divided, results=PartitionSpec())(vectors, bias, count, probes)


def _best_blocks(
    vectors: Array, bias: Array, count: Array, probes: Array, kept: int, mesh: Mesh | None, how: Plan
) -> tuple[Array, Array]:
    """([n, kept] the best scores that blocks have, [n, kept] which blocks)."""
    size, n = bias.shape[0], probes.shape[0]
    tile = min(size, max(BLOCK, how.tile // BLOCK * BLOCK))
    used = (count + _sharing(mesh) - 1) // _sharing(mesh)

    def screen(i: Array, best: Array) -> Array:
        # The last tile reaches back over rows already seen.
        start = jnp.minimum(i * tile, size - tile)
        rows, half = (lax.dynamic_slice_in_dim(x, start, tile) for x in (vectors, bias))
        # HIGHEST: a GPU would otherwise round the factors to TF32's 10 bits.
        product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
        # Each way round is up to twice as quick as the other on a CPU, where it is taken.
        if n == 1:
            score = (product(probes, rows.T) + half).reshape(-1, BLOCK, 1)
        else:
            score = (product(rows, probes.T) + half[:, None]).reshape(-1, BLOCK, n)
        return lax.dynamic_update_slice(best, jnp.max(score, 1), (start // BLOCK, 0))

    best = jnp.full((size // BLOCK, n), -jnp.inf, jnp.float32)
    best = lax.fori_loop(0, (used + tile - 1) // tile, screen, best)
    score, block = lax.top_k(best.T, kept)
    # The barriers keep XLA from sorting all blocks, as it does where only a part of what top_k gives is used: 90 ms for 64
    # probes and a million rows. One barrier for both would abort XLA (0.10.2) where it writes top_k as a sort.
    return lax.optimization_barrier(score), lax.optimization_barrier(block)


def _is_proved(probes: Array, farthest: Array, missed: Array) -> Array:
    """[n] bool: whether all rows whose computed score is at most `missed` are farther than `farthest`.

    A computed sum of d products of x and t is off by at most about d u |x| |t|, with u = 2⁻²⁴ (Higham 2002, Accuracy and
    Stability of Numerical Algorithms, section 3.1). A row as near as `farthest` has a length of at most |x| + √farthest.
    """
    square = jnp.sum(probes * probes, 1)
    longest = jnp.sqrt(square) + jnp.sqrt(farthest)
    # Twice that bound, as it is itself computed in float32.
    slack = 2.0**-23 * (probes.shape[1] + 8) * (2 * jnp.sqrt(square) * longest + longest * longest + square + farthest)
    return (missed == -jnp.inf) | (square - 2 * missed - slack > farthest)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _every(
    vectors: Array, bias: Array, count: Array, probes: Array, k: int, mesh: Mesh | None, how: Plan
) -> tuple[Array, Array, Array]:
    """As `_screened`, from the distance to every row."""

    def every(vectors: Array, bias: Array, probes: Array) -> tuple[Array, Array, Array]:
        places = jnp.arange(bias.shape[0])
        distance, place = lax.map(lambda probe: _first(_distances(probe, vectors, bias), places, k), probes)
        return *_joined(distance, place, k, mesh), jnp.ones(probes.shape[0], bool)

    return _each(every, mesh, divided=(True, True, False), results=PartitionSpec())(vectors, bias, probes)

"""Which photos are probably in the wrong folder, which folders are one person, and which hold two.

Everything is judged by embeddings, so a network has to exist that did not learn from these very labels: it fits the
errors that it was trained on. All is ranked, the surest first, and to be looked at by a person.

The measure is a likelihood, for folders of 2 photos and of 2,000 in one ranking. A cosine to a centroid is not comparable
between them: if two photos of a person have the cosine ρ on average, a photo and the mean direction of k others have

    ρ · sqrt(k / (1 + (k-1)·ρ)):     ρ = 0.5 gives 0.50 for k = 1, 0.67 for k = 4 and 0.70 for k = 20,

so every photo of a small folder would seem to be out of place, and to belong to some large one. Here a person is a point
y ~ N(0, ρ), a photo x ~ N(y, 1-ρ), the same in all directions (the two-covariance model, Brümmer & de Villiers 2010, with
spherical covariances). Given k photos with the sum s, a further one is N(μ, (1-ρ)·r), with

    λ = (1-ρ)/ρ     μ = s / (k+λ)     r = 1 + 1/(k+λ)
    fit(x) = -½ · (|x-μ|² / r + (1-ρ)·log r)

`fit` is the log-likelihood a dimension, times 1-ρ, so that it is in squared distances. r is what a small folder pays for
being known badly. ρ is measured, nothing is tuned, and how many dimensions really vary does not change an order.

What counts as probable is measured on the same data too (`Thresholds`). All passes go over tiles of matrix products;
beside the embeddings they keep [m, d] sums of m people and a few numbers a photo.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

NEAREST = 3
"""People per photo, and per person, that are looked at more closely."""
ROWS, COLUMNS = 1024, 8192
"""Of a tile of a matrix product: 32 MB in float32."""
MOST_COUNTED = 8
"""Photos of a person that count as evidence where folders are held against folders. Photos of one day have more in common
than the model knows, and hundreds of them would seem to prove whatever they show."""
GRAIN = 2.0**-16
"""Fits are rounded to it, so that the noise of a matrix product does not order what is equally near: ties then go to the
lowest number, whatever the tiles."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What was measured, and what decides; `fit` as the module says, 0 is the best and lower is worse."""

    pair_cosine: float
    """ρ: mean cosine of two photos of a person, every person weighing the same."""
    own_median: float
    """Median fit of a photo to the others of its folder."""
    own_low: float
    """5 % quantile of the same: a photo that looks like somebody else fits its own folder worse than this."""
    stranger: float
    """90 % quantile of the cosine of a photo to the centroid of a random other person: one that has no more to its own
    folder looks like nobody of it."""
    nearest_high: float
    """99 % quantile, over photos that fit their own folder better than the median, of the fit to the nearest other
    person: only what is nearer looks like somebody else."""
    halves: float
    """Median excess of the log-likelihood ratio of the two halves of a folder of 4 photos or more over what the model
    expects: two people at or above it look like one. NaN if no folder has 4."""
    apart: float
    """90 % quantile of the log-likelihood ratio of a cluster of one folder and one of another: the two clusters of one
    folder at or below it look like two people. NaN if no two folders have two clusters."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LabelErrors:
    """Photos that are probably in the wrong folder, the largest margin first; equal ones in the order of photos."""

    photo: Ints
    """[s] index of the photo."""
    person: Ints
    """[s] whose folder it is in."""
    looks_like: Ints
    """[s] the nearest other person."""
    own: Floats
    """[s] cosine to the centroid of the folder's other photos."""
    other: Floats
    """[s] cosine to the centroid of the other person's photos."""
    margin: Floats
    """[s] fit to the other person minus fit to the own folder."""
    somebody: NDArray[np.bool_]
    """[s] looks like `looks_like`; False: like nobody of its folder, and `looks_like` is a hint at most."""
    sure: NDArray[np.bool_]
    """[s] the folder has 3 photos or more; False: it has 2, and either may be the wrong one."""

    def __len__(self) -> int:
        return len(self.photo)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SplitPeople:
    """Pairs of people who are probably one, the surest first."""

    first: Ints
    """[s] < second."""
    second: Ints
    cosine: Floats
    """[s] of their centroids."""
    score: Floats
    """[s] log-likelihood ratio a dimension, one person against two."""

    def __len__(self) -> int:
        return len(self.first)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MergedPeople:
    """Folders that probably hold two people, the surest first."""

    person: Ints
    size: Ints
    """[s, 2] photos of each cluster, at least 2; the first holds the folder's first photo."""
    cosine: Floats
    """[s] of the clusters' centroids."""
    score: Floats
    """[s] log-likelihood ratio a dimension, one person against two: the lower, the surer."""
    side: NDArray[np.int8]
    """[n] cluster 0 or 1 of every photo of these folders, -1 for other photos."""

    def __len__(self) -> int:
        return len(self.person)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """What embeddings tell about labels."""

    label_errors: LabelErrors
    splits: SplitPeople
    merges: MergedPeople
    thresholds: Thresholds
    near: Ints
    """[n, NEAREST] the people near to each photo, beside its own; `copies.find` looks among them."""


def audit(x: Floats, identity: NDArray[np.integer]) -> Labels:
    """Everything that embeddings tell about labels.

    Cost: O(n·m·d) for n photos of m people with d numbers, which is the nearest person of every photo, and O(m²·d + n·d)
    beside it. Memory: O(n·NEAREST + m·d) and a tile, beside `x`. 10 million photos of 100,000 people with 512 numbers are
    10¹⁵ operations, 20 minutes at one teraflop/s, and half an hour more to pick the nearest; `x` is 20 GB.

    Args:
      x: [n, d] float32 as `centred` gives them.
      identity: [n] int, ascending, every person 0..m-1 has at least one photo.
    """
    rho = pair_cosine(x, identity)
    near, near_fit = nearest_people(x, identity, rho=rho)
    errors, levels = label_errors(x, identity, near, near_fit, rho=rho)
    splits, halves = split_people(x, identity, rho=rho)
    merges, apart = merged_people(x, identity, rho=rho)
    return Labels(
        label_errors=errors, splits=splits, merges=merges, near=near,
        thresholds=Thresholds(pair_cosine=rho, halves=halves, apart=apart, **levels),
    )  # fmt: skip


def centred(
    emb: NDArray[np.floating], identity: NDArray[np.integer], names: Sequence[str] | NDArray[np.str_] | None = None
) -> tuple[Floats, Floats]:
    """Embeddings as directions from the middle of all people.

    The model wants people to lie around 0. Embeddings that all lie in one half of the sphere, as dlib's do, would otherwise
    make any two people alike.

    Args:
      emb: [n, d], any length but zero.
      identity: [n] int, ascending, every person 0..m-1 has at least one photo.
      names: [n] what the photos are called in errors; their numbers when not given.

    Returns:
      ([n, d] float32 of unit length; [d] the middle, which `directions` takes for further embeddings).

    Raises:
      ValueError: the arrays do not fit this, or fewer than two people have two photos.
    """
    emb, identity = np.asarray(emb), np.asarray(identity)
    if emb.ndim != 2 or identity.shape != emb.shape[:1] or not len(emb):
        raise ValueError(f"emb {emb.shape} and identity {identity.shape}: expected [n, d] and [n], n at least 1.")
    if identity.dtype.kind not in "iu" or identity[0] != 0 or not np.isin(np.diff(identity), (0, 1)).all():
        raise ValueError(
            "identity must be integers 0..m-1 in ascending order, as in Photos: sort the photos by person."
        )
    if (np.bincount(identity) > 1).sum() < 2:
        raise ValueError(
            f"of {identity[-1] + 1} people fewer than 2 have two photos: labels are judged by a person's other photos."
        )
    x = directions(emb, np.zeros(emb.shape[1], np.float32), names=names)
    sums, count = person_sums(x, identity)
    middle = (sums / count[:, None]).mean(axis=0).astype(np.float32)
    return directions(x, middle, out=x, names=names), middle


def directions(
    emb: NDArray[np.floating],
    middle: Floats,
    out: Floats | None = None,
    names: Sequence[str] | NDArray[np.str_] | None = None,
) -> Floats:
    """[n, d] float32 unit vectors: embeddings of unit length, minus `middle`, scaled to unit length again.

    Args:
      emb: [n, d].
      middle: [d].
      out: where to write, such as `emb` itself; a new array when not given.
      names: [n] for errors.

    Raises:
      ValueError: an embedding that is not finite, or has no direction.
    """
    x = np.empty(emb.shape, np.float32) if out is None else out
    for start in range(0, len(emb), COLUMNS):
        rows = emb[start : start + COLUMNS].astype(np.float64)
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        rows = np.divide(rows, length, out=np.zeros_like(rows), where=length > 0) - middle
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        wrong = np.flatnonzero(~(np.isfinite(length) & (length > 1e-6)))
        if len(wrong):
            which = start + wrong[0] if names is None else f"of {names[start + wrong[0]]}"
            raise ValueError(f"the embedding {which} has no direction: it is 0, not finite, or the middle of all.")
        x[start : start + COLUMNS] = rows / length
    return x


# ---- photos and people -------------------------------------------------------------------------------------------------


def pair_cosine(x: Floats, identity: NDArray[np.integer]) -> float:
    """ρ: the mean cosine of two photos of a person, over people with two photos or more, each weighing the same.

    It is kept within [0.001, 0.999]: beyond, photos tell nothing about people, or people do not vary. O(n·d).
    """
    sums, count = person_sums(x, identity)
    several = count > 1
    return float(np.clip(_inner(sums[several], count[several]).mean(), 0.001, 0.999))


def own_fit(x: Floats, identity: NDArray[np.integer], *, rho: float) -> tuple[Floats, Floats]:
    """How every photo fits the others of its folder.  O(n·d).

    Args:
      x: [n, d] unit length.
      identity: [n] ascending.
      rho: `pair_cosine`.

    Returns:
      ([n] fit, [n] cosine to the centroid of the others); NaN for a person's only photo. Where the others cancel out
      exactly, the cosine is 0.
    """
    sums, count = person_sums(x, identity)
    fit, cosine = np.full(len(x), np.nan, np.float32), np.full(len(x), np.nan, np.float32)
    for start in range(0, len(x), COLUMNS):
        who = identity[start : start + COLUMNS]
        rows = x[start : start + COLUMNS].astype(np.float64)
        others = count[who] - 1
        rest = sums[who] - rows
        dot, norm = np.einsum("nd,nd->n", rest, rows), np.linalg.norm(rest, axis=1)
        some = others > 0
        fit[start : start + COLUMNS][some] = _fit(dot, norm**2, others, rho)[some]
        cosine[start : start + COLUMNS][some] = (dot / np.where(norm > 1e-6, norm, np.inf))[some]
    return fit, cosine


def nearest_people(
    x: Floats,
    identity: NDArray[np.integer],
    *,
    rho: float,
    k: int = NEAREST,
    rows: int = ROWS,
    columns: int = COLUMNS,
) -> tuple[Ints, Floats]:
    """The k other people that every photo fits best.  O(n·m·d), in tiles [rows, columns].

    Returns:
      ([n, k] people, best first, of equal ones the lowest number; [n, k] fits). With fewer than k others, the last
      columns hold -1 and -inf.
    """
    sums, count = person_sums(x, identity)
    lam, spread = _lambda(rho), 1 + 1 / (count + _lambda(rho))
    # fit = x·μ/r - ½((1 + |μ|²)/r + (1-ρ)·log r) for |x| = 1: a matrix product and a number a person.
    square = np.einsum("md,md->m", sums, sums) / (count + lam) ** 2
    offset = (-0.5 * ((1 + square) / spread + (1 - rho) * np.log(spread))).astype(np.float32)
    scaled = (sums / ((count + lam) * spread)[:, None]).astype(np.float32)

    people = np.full((len(x), k), -1, np.int64)
    fits = np.full((len(x), k), -np.inf, np.float32)
    for top in range(0, len(x), rows):
        who = identity[top : top + rows]
        for left in range(0, len(count), columns):
            tile = x[top : top + rows] @ scaled[left : left + columns].T
            tile += offset[left : left + columns]
            rounded(tile)
            inside = np.flatnonzero((who >= left) & (who < left + tile.shape[1]))
            tile[inside, who[inside] - left] = -np.inf
            _keep_best(tile, left, people[top : top + rows], fits[top : top + rows])
    return people, fits


def label_errors(
    x: Floats, identity: NDArray[np.integer], near: Ints, near_fit: Floats, *, rho: float
) -> tuple[LabelErrors, dict[str, float]]:
    """Photos that look like somebody else, or like nobody of their folder.  O(n·d).

    The margin is the fit to the nearest other person minus that to the own folder without the photo itself. With m people
    the nearest of them is near by chance, so a margin above 0 alone says little. A photo is listed if

    - it looks like nobody of its folder: its cosine to the other photos' centroid is no more than nine tenths of all photos
      have to a random stranger's; or
    - it looks like somebody else: that, or it fits its folder worse than 95 % of all photos do; and it fits another person
      better than 99 % of the photos beyond doubt fit any other, and better than its own folder.

    Args:
      x: [n, d] unit length.
      identity: [n] ascending.
      near, near_fit: [n, k] as `nearest_people` gives them.
      rho: `pair_cosine`.

    Returns:
      (the errors, the four levels of `Thresholds` that they were judged by).
    """
    sums, count = person_sums(x, identity)
    own, own_cosine = own_fit(x, identity, rho=rho)
    judged = np.flatnonzero(count[identity] > 1)
    # Of every photo a random photo of somebody else: folders are met as often as they have photos, as the own ones are.
    mine = np.bincount(identity[judged], minlength=len(count))
    begins = (np.cumsum(mine) - mine)[identity[judged]]
    drawn = np.random.default_rng(0).integers(0, len(judged) - mine[identity[judged]])
    drawn = judged[drawn + np.where(drawn >= begins, mine[identity[judged]], 0)]
    strangers = np.concatenate(
        [
            cosines(x[judged[part]], sums[identity[drawn[part]]])
            for start in range(0, len(judged), COLUMNS)
            for part in [slice(start, start + COLUMNS)]
        ]
    )
    median, low = np.quantile(own[judged], [0.5, 0.05])
    beyond_doubt = judged[own[judged] >= median]
    levels = {
        "own_median": float(median),
        "own_low": float(low),
        "stranger": float(np.quantile(strangers, 0.9)),
        "nearest_high": float(np.quantile(near_fit[beyond_doubt, 0], 0.99)),
    }

    margin = near_fit[judged, 0] - own[judged]
    nobody = own_cosine[judged] <= levels["stranger"]
    # Of many wrong labels, most fit their folders no worse than 95 % of all photos do: then they are among those 5 %.
    somebody = (
        (nobody | (own[judged] < levels["own_low"])) & (near_fit[judged, 0] > levels["nearest_high"]) & (margin > 0)
    )
    listed = np.flatnonzero(somebody | nobody)
    listed = listed[np.argsort(-margin[listed], kind="stable")]
    photo = judged[listed]
    person, other = identity[photo].astype(np.int64), near[photo, 0]
    errors = LabelErrors(
        photo=photo,
        person=person,
        looks_like=other,
        own=own_cosine[photo],
        other=cosines(x[photo], sums[other]),
        margin=margin[listed],
        somebody=somebody[listed],
        sure=count[person] > 2,
    )
    return errors, levels


# ---- people and people -------------------------------------------------------------------------------------------------


def split_people(
    x: Floats,
    identity: NDArray[np.integer],
    *,
    rho: float,
    k: int = NEAREST,
    rows: int = ROWS,
    columns: int = COLUMNS,
) -> tuple[SplitPeople, float]:
    """Pairs of people who look like one.  O(m²·d), in tiles [rows, columns].

    They are ranked by the log-likelihood ratio. How high that can be depends on how many photos there are, so the level is
    one of its excess over what one person's photos of those numbers have on average under the model: the median, over
    folders of 4 photos or more, of the excess of every second photo of a folder and the others of it.

    Returns:
      (pairs with a ratio above 0 and an excess at or above the level, among the k most alike of every person; the level,
      NaN if no folder has 4 photos).
    """
    whole, photos = person_sums(x, identity)
    sums, count = _capped(whole, photos)
    place = np.arange(len(x)) - (np.cumsum(photos) - photos)[identity]
    odd, n_odd = person_sums(x, identity, weight=place % 2)
    halved = photos >= 4
    level = math.nan
    if halved.any():
        even, n_even = _capped(whole[halved] - odd[halved], photos[halved] - n_odd[halved])
        odd, n_odd = _capped(odd[halved], n_odd[halved])
        level = float(np.median(_ratio(odd, n_odd, even, n_even, rho) - _expected(n_odd, n_even, rho)))

    people = np.full((len(count), k), -1, np.int64)
    scores = np.full((len(count), k), -np.inf, np.float32)
    for top in range(0, len(count), rows):
        for left in range(0, len(count), columns):
            one, other = slice(top, top + rows), slice(left, left + columns)
            tile = ratios(sums[one], count[one], sums[other], count[other], rho)
            rounded(tile)
            itself = np.arange(max(top, left), min(top + len(tile), left + tile.shape[1]))
            tile[itself - top, itself - left] = -np.inf
            _keep_best(tile, left, people[one], scores[one])

    person, rank = np.nonzero(scores > 0)
    first, second = unordered(person, people[person, rank], len(count))
    ratio = _ratio(sums[first], count[first], sums[second], count[second], rho)
    kept = ratio - _expected(count[first], count[second], rho) >= (np.inf if math.isnan(level) else level)
    first, second, score = first[kept], second[kept], ratio[kept].astype(np.float32)
    order = np.lexsort((second, first, -score))
    first, second = first[order], second[order]
    pairs = SplitPeople(
        first=first, second=second, cosine=cosines(sums[first], sums[second]), score=score[order]
    )  # fmt: skip
    return pairs, level


def merged_people(x: Floats, identity: NDArray[np.integer], *, rho: float) -> tuple[MergedPeople, float]:
    """People whose folder holds two clusters of photos that are two people.  O(n·d).

    Each folder of 4 photos or more is divided by 2-means, begun from its main direction. That alone finds two clusters in
    anybody's photos, so both must have at least 2 photos, as alike as the photos of the loosest quarter of folders are, and
    the two be no more alike than nine tenths of the clusters of different people are.

    Returns:
      (folders, the level, NaN if no two folders have two clusters).
    """
    sums, count = person_sums(x, identity)
    side = np.full(len(x), -1, np.int8)
    starts = np.cumsum(count) - count
    for first, last in _whole_people(count):
        begin, end = starts[first], starts[last - 1] + count[last - 1]
        side[begin:end] = _two_means(x[begin:end], count[first:last])
    one, n_one = person_sums(x, identity, weight=side == 1)
    able = np.flatnonzero((n_one >= 2) & (count - n_one >= 2))
    b, n_b = one[able], n_one[able]
    a, n_a = sums[able] - b, count[able] - n_b
    level = math.nan
    listed = np.zeros(0, np.int64)
    (few_a, k_a), (few_b, k_b) = _capped(a, n_a), _capped(b, n_b)
    score = _ratio(few_a, k_a, few_b, k_b, rho)
    if len(able) > 1:
        level = float(np.quantile(_ratio(few_a, k_a, np.roll(few_b, 1, axis=0), np.roll(k_b, 1), rho), 0.9))
        several = count > 1
        loose = np.quantile(_inner(sums[several], count[several]), 0.25)
        listed = np.flatnonzero((score <= level) & (_inner(a, n_a) >= loose) & (_inner(b, n_b) >= loose))
    listed = listed[np.argsort(score[listed], kind="stable")]
    side[~np.isin(identity, able[listed])] = -1
    merged = MergedPeople(
        person=able[listed],
        size=np.stack([n_a[listed], n_b[listed]], axis=1).astype(np.int64),
        cosine=cosines(a[listed], b[listed]),
        score=score[listed].astype(np.float32),
        side=side,
    )
    return merged, level


# ---- pieces ------------------------------------------------------------------------------------------------------------


def _inner(sums: NDArray[np.float64], n: NDArray[np.integer]) -> NDArray[np.float64]:
    """[m] mean cosine of two of n photos, whose sum is given; n is 2 at least."""
    return (np.einsum("md,md->m", sums, sums) - n) / (n * (n - 1.0))


def _lambda(rho: float) -> float:
    return (1 - rho) / rho


def _fit(
    dot: NDArray[np.floating], square: NDArray[np.floating], k: NDArray[np.integer], rho: float
) -> NDArray[np.float64]:
    """`fit` of photos x to sums s of k photos: dot = x·s, square = |s|²; see the module."""
    known = k + _lambda(rho)
    spread = 1 + 1 / known
    distance = 1 - 2 * dot / known + square / known**2
    return -0.5 * (distance / spread + (1 - rho) * np.log(spread))


def _capped(sums: NDArray[np.float64], n: NDArray[np.integer]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sums of n photos as if they were of MOST_COUNTED at most, with the same mean, and how many they are then."""
    k = np.minimum(n, MOST_COUNTED).astype(np.int64)
    return sums * (k / np.maximum(n, 1))[:, None], k


def _expected(n_a: NDArray[np.integer], n_b: NDArray[np.integer], rho: float) -> NDArray[np.float64]:
    """The mean of `_ratio` over one person's photos: both of its squares are then as large as their variances."""
    given, without = (1 - rho) * (1 / (n_a + _lambda(rho)) + 1 / n_b), rho + (1 - rho) / n_b
    return 0.5 * (np.log(without) - np.log(given))


def ratios(
    a: NDArray[np.floating], n_a: NDArray[np.integer], b: NDArray[np.floating], n_b: NDArray[np.integer], rho: float
) -> Floats:
    """[p, q] log-likelihood ratios a dimension of sums a [p, d] and b [q, d] of n photos: one person against two.

    It is that of the mean of b's photos, N(μ, (1-ρ)·(1/(n_a+λ) + 1/n_b)) given a's and N(0, ρ + (1-ρ)/n_b) without; it is
    symmetric. Half a float32 tile at a time is made of the matrix product, and few arrays beside it.
    """
    known = n_a + _lambda(rho)
    mean, point = (b / n_b[:, None]).astype(np.float32), (a / known[:, None]).astype(np.float32)
    distance: Floats = -2 * (point @ mean.T)
    distance += np.einsum("pd,pd->p", point, point)[:, None]
    square = np.einsum("qd,qd->q", mean, mean)
    distance += square
    given = (1 - rho) * (1 / known[:, None] + 1 / n_b).astype(np.float32)
    without = rho + (1 - rho) / n_b
    distance /= given
    distance += np.log(given)
    distance *= -0.5
    distance += (0.5 * (square / without + np.log(without))).astype(np.float32)
    return distance


def _ratio(
    a: NDArray[np.floating], n_a: NDArray[np.integer], b: NDArray[np.floating], n_b: NDArray[np.integer], rho: float
) -> NDArray[np.float64]:
    """The same for row i of a with row i of b: [p]."""
    known = n_a + _lambda(rho)
    mean = b / n_b[:, None]
    gap = np.square(mean - a / known[:, None]).sum(axis=1, dtype=np.float64)
    given, without = (1 - rho) * (1 / known + 1 / n_b), rho + (1 - rho) / n_b
    square = np.square(mean).sum(axis=1, dtype=np.float64)
    return -0.5 * (gap / given + np.log(given)) + 0.5 * (square / without + np.log(without))


def person_sums(
    x: Floats, identity: NDArray[np.integer], weight: NDArray | None = None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """([m, d] sum of each person's photos, [m] how many); of those with weight 1 where weights 0 or 1 are given."""
    count = np.bincount(identity)
    starts = np.cumsum(count) - count
    sums = np.empty((len(count), x.shape[1]))
    for first, last in _whole_people(count):
        begin, end = starts[first], starts[last - 1] + count[last - 1]
        rows = x[begin:end].astype(np.float64)
        if weight is not None:
            rows *= weight[begin:end, None]
        sums[first:last] = np.add.reduceat(rows, starts[first:last] - begin)
    if weight is not None:
        count = np.add.reduceat(weight.astype(np.int64), starts)
    return sums, count


def _whole_people(count: NDArray[np.integer]) -> Iterator[tuple[int, int]]:
    """Ranges of people with about COLUMNS photos together, each person in one."""
    bounds = np.flatnonzero(np.diff(np.cumsum(count) // COLUMNS, prepend=0)) + 1
    edges = np.unique([0, *bounds, len(count)])
    yield from zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)


def cosines(a: NDArray[np.floating], b: NDArray[np.floating]) -> Floats:
    """[p] cosines of rows, 0 where one has no length; in pieces, for long lists."""
    result = np.empty(len(a), np.float32)
    for start in range(0, len(a), COLUMNS):
        one, other = a[start : start + COLUMNS].astype(np.float64), b[start : start + COLUMNS].astype(np.float64)
        length = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        dot = np.einsum("pd,pd->p", one, other)
        result[start : start + COLUMNS] = dot / np.where(length > 1e-9, length, np.inf)
    return result


def rounded(tile: Floats) -> None:
    """To multiples of GRAIN, in place."""
    tile *= 1 / GRAIN
    np.rint(tile, out=tile)
    tile *= GRAIN


def _keep_best(tile: Floats, left: int, people: Ints, values: Floats) -> None:
    """Puts the best columns of a tile into the lists [rows, k], in place; of equal ones the lowest number stays first."""
    rows, k = values.shape
    at = np.arange(rows)
    found = np.full((rows, k), -1, np.int64)
    best = np.full((rows, k), -np.inf, np.float32)
    for place in range(min(k, tile.shape[1])):
        column = tile.argmax(axis=1)
        value = tile[at, column]
        best[:, place] = value
        found[:, place] = np.where(value > -np.inf, column + left, -1)
        tile[at, column] = -np.inf
    every_value = np.concatenate([values, best], axis=1)
    order = np.argsort(-every_value, axis=1, kind="stable")[:, :k]
    people[:] = np.take_along_axis(np.concatenate([people, found], axis=1), order, axis=1)
    values[:] = np.take_along_axis(every_value, order, axis=1)


def unordered(one: Ints, other: Ints, n: int) -> tuple[Ints, Ints]:
    """Each pair once, the lower number first; numbers are below n."""
    pair = np.unique(np.minimum(one, other).astype(np.int64) * n + np.maximum(one, other))
    return pair // n, pair % n


def _two_means(x: Floats, count: NDArray[np.integer], rounds: int = 8) -> NDArray[np.int8]:
    """Every person's photos in two clusters, by 2-means from the halves along the main direction: [n] 0 or 1.

    A person's first photo is in cluster 0. All people take their steps at once.
    """
    starts = np.cumsum(count) - count
    person = np.repeat(np.arange(len(count)), count)
    rows = x.astype(np.float64)
    rest = rows - (np.add.reduceat(rows, starts) / count[:, None])[person]
    # Power iteration, from the photo that is furthest out.
    out = np.square(rest).sum(axis=1)
    order = np.lexsort((-out, person))
    axis = rest[order[starts]]
    for _ in range(rounds):
        along = np.einsum("nd,nd->n", rest, axis[person])
        axis = np.add.reduceat(rest * along[:, None], starts)
        length = np.linalg.norm(axis, axis=1, keepdims=True)
        axis /= np.where(length > 0, length, 1)
    side = np.einsum("nd,nd->n", rest, axis[person]) > 0
    for _ in range(rounds):
        n_one = np.add.reduceat(side.astype(np.int64), starts)
        one = np.add.reduceat(rows * side[:, None], starts)
        zero = np.add.reduceat(rows * ~side[:, None], starts)
        one /= np.maximum(n_one, 1)[:, None]
        zero /= np.maximum(count - n_one, 1)[:, None]
        middle = 0.5 * (np.square(one).sum(axis=1) - np.square(zero).sum(axis=1))
        side = np.einsum("nd,nd->n", rows, (one - zero)[person]) > middle[person]
    return (side != side[starts][person]).astype(np.int8)

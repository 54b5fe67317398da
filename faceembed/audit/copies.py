"""Which photographs are in a set twice: told by embeddings, confirmed by pixels.

What copies look like is measured, on copies made of some photos: smaller, compressed and cut anew. 19 of 20 of those pass
both levels.
"""

import dataclasses
import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from faceembed.audit.labels import ROWS, Floats, Ints, cosines, directions, rounded, unordered

Crops = NDArray[np.uint8]
"""uint8 RGB [k, s, s, 3]."""

SIDE = 32
"""Pixels of a side in which copies are compared: as many as a recompressed, smaller copy still has."""
SAMPLE = 128
"""Photos that copies are made of."""
CHUNK = 1024
"""Pairs whose photos are read at once."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Copies:
    """Pairs of photos that are one photograph, the most alike first."""

    first: Ints
    """[c] < second."""
    second: Ints
    alike: Floats
    """[c] cosine of the two crops' edges, 1 = the same pixels."""
    mirrored: NDArray[np.bool_]
    """[c] one is the mirror image of the other."""
    across: NDArray[np.bool_]
    """[c] the photos are in two folders: one of the labels is wrong, or the two are one person."""
    candidates: int
    """Pairs with nearly equal embeddings."""
    unseen: int
    """Those of them whose pixels were not compared."""
    cosine: float
    """From which on embeddings are nearly equal."""
    pixels: float
    """From which on crops are one photograph."""


def find(
    x: Floats,
    identity: NDArray[np.integer],
    near: Ints,
    *,
    read: Callable[[Ints], Crops],
    embed: Callable[[Crops], NDArray[np.floating]],
    middle: Floats,
    most: int,
) -> Copies:
    """Copies among photos whose embeddings are nearly equal.

    Args:
      x, middle: [n, d] and [d], as `labels.centred` gives them.
      identity: [n] ascending.
      near: [n, k] people near to each photo, beside its own, -1 for none.
      read: numbers of photos, ascending → what the network sees of them.
      embed: that → embeddings.
      most: pairs whose pixels are compared, the nearest first.
    """
    cosine, pixels = levels(identity, read=read, embed=embed, middle=middle)
    first, second = near_duplicates(x, identity, near, cosine=cosine)
    candidates = len(first)
    first, second = first[:most], second[:most]
    alike, mirrored = np.zeros(len(first), np.float32), np.zeros(len(first), bool)
    for start in range(0, len(first), CHUNK):
        part = slice(start, start + CHUNK)
        used, place = np.unique(np.concatenate([first[part], second[part]]), return_inverse=True)
        alike[part], mirrored[part] = correlation(*np.split(shrunk(read(used))[place], 2))
    kept = np.flatnonzero(alike >= pixels)
    kept = kept[np.argsort(-alike[kept], kind="stable")]
    first, second = first[kept], second[kept]
    return Copies(
        first=first, second=second, alike=alike[kept], mirrored=mirrored[kept], candidates=candidates,
        across=identity[first] != identity[second], unseen=candidates - len(alike), cosine=cosine, pixels=pixels,
    )  # fmt: skip


def levels(
    identity: NDArray[np.integer],
    *,
    read: Callable[[Ints], Crops],
    embed: Callable[[Crops], NDArray[np.floating]],
    middle: Floats,
) -> tuple[float, float]:
    """(cosine of embeddings, cosine of edges) that 19 of 20 copies reach; by the second, at most one in a hundred pairs of
    photos of two people does. The arguments are those of `find`."""
    sample = np.unique(np.linspace(0, len(identity) - 1, SAMPLE).round().astype(np.int64))
    crops = read(sample)
    worse = np.stack([degraded(crop) for crop in crops])
    # Both sides are embedded here and now: the crops read above, not those that a file's embeddings were made of.
    one, other = (directions(embed(side), middle) for side in (crops, worse))
    cosine = float(np.quantile(np.einsum("nd,nd->n", one, other), 0.05))
    small = shrunk(crops)
    alike, _ = correlation(small, shrunk(worse))
    # Neighbours of the sample may be photos of one person, and then copies.
    shift = len(sample) // 2
    strangers = identity[sample] != np.roll(identity[sample], shift)
    others, _ = correlation(small[strangers], np.roll(small, shift, axis=0)[strangers])
    chance = [np.quantile(others, 0.99)] if len(others) else []
    return cosine, float(max([np.quantile(alike, 0.05), *chance]))


def all_but_one(copies: Copies) -> Ints:
    """Of each group of photos that are linked as copies in one folder all but the first, ascending."""
    from scipy.sparse import coo_array, csgraph

    one, other = copies.first[~copies.across], copies.second[~copies.across]
    photos, place = np.unique(np.concatenate([one, other]), return_inverse=True)
    a, b = np.split(place, 2)
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(len(photos),) * 2)
    _, group = csgraph.connected_components(graph, directed=False)
    _, first = np.unique(group, return_index=True)
    return np.delete(photos, first)


# ---- by embedding ------------------------------------------------------------------------------------------------------


def near_duplicates(
    x: Floats, identity: NDArray[np.integer], near: Ints, *, cosine: float, tile: int = ROWS
) -> tuple[Ints, Ints]:
    """Pairs of photos with nearly equal embeddings, the nearest first; pixels have to confirm them.

    Of every photo the nearest one of its own folder and the nearest one of the people in `near` are looked at: of c copies
    of a photo c/2 to c - 1 pairs are found, not all c². A copy in another folder pulls that folder's centroid to it, and
    makes that person one of the nearest, unless the folder is large and of somebody else.

    Cost: O(n·(n̄ + k·tile)·d); memory O(n + tile²).

    Args:
      x: [n, d] unit length.
      identity: [n] ascending.
      near: [n, k] people near to each photo, -1 for none.
      cosine: at or above it a pair is listed.
      tile: side of a tile of the matrix products.

    Returns:
      ([p], [p] photos, the first number lower than the second).
    """
    found = []
    everyone = np.arange(len(x))
    for rows, groups in [(everyone, identity), *((everyone, column) for column in near.T)]:
        kept = groups >= 0
        rows, groups = rows[kept], groups[kept]
        order = np.argsort(groups, kind="stable")
        best, value = _best_in_group(x, rows[order], groups[order], identity, tile)
        close = value >= cosine
        found.append(np.stack([rows[order][close], best[close]]))
    one, other = np.concatenate(found, axis=1)
    first, second = unordered(one, other, len(x))
    value = cosines(x[first], x[second])
    order = np.lexsort((second, first, -value))
    return first[order], second[order]


def _best_in_group(
    x: Floats, rows: Ints, groups: NDArray[np.integer], identity: NDArray[np.integer], tile: int
) -> tuple[Ints, Floats]:
    """For each row the photo of a person that is nearest, itself excepted.

    Args:
      x: [n, d].
      rows: [r] photos.
      groups: [r] the person to look among, ascending, so that a tile of rows meets a short range of columns.
      identity: [n] ascending.
      tile: side of a tile.

    Returns:
      ([r] photo, the lowest number of equal ones; [r] cosine, -inf where there is no other photo).
    """
    count = np.bincount(identity)
    ends = np.cumsum(count)
    best, value = np.zeros(len(rows), np.int64), np.full(len(rows), -np.inf, np.float32)
    for top in range(0, len(rows), tile):
        part, group = rows[top : top + tile], groups[top : top + tile]
        probes = x[part]
        for left in range(ends[group[0]] - count[group[0]], ends[group[-1]], tile):
            right = min(left + tile, ends[group[-1]])
            cosines = probes @ x[left:right].T
            rounded(cosines)
            cosines[identity[left:right] != group[:, None]] = -np.inf
            inside = np.flatnonzero((part >= left) & (part < right))
            cosines[inside, part[inside] - left] = -np.inf
            column = cosines.argmax(axis=1)
            found = cosines[np.arange(len(part)), column]
            better = found > value[top : top + tile]
            value[top : top + tile][better] = found[better]
            best[top : top + tile][better] = column[better] + left
    return best, value


# ---- by pixels ---------------------------------------------------------------------------------------------------------


def fingerprints(crops: NDArray[np.uint8]) -> Floats:
    """What is left of photos when brightness, contrast and slow shading are taken away: differences of grey neighbours.

    Aligned faces are alike as grey pictures even if they are of two people; their edges are not.

    Args:
      crops: uint8 RGB [b, s, s, 3], small: 32 pixels are as many as a recompressed copy keeps.

    Returns:
      [b, 2·s·(s-1)] float32 of unit length; zeros for a photo of one colour.
    """
    grey = crops.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    across = np.diff(grey, axis=2).reshape(len(crops), -1)
    down = np.diff(grey, axis=1).reshape(len(crops), -1)
    edges: Floats = np.concatenate([across, down], axis=1)
    norm = np.linalg.norm(edges, axis=1, keepdims=True)
    return np.divide(edges, norm, out=np.zeros_like(edges), where=norm > 1e-3)


def correlation(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> tuple[Floats, NDArray[np.bool_]]:
    """How alike photos are, pixel by pixel, as they are or mirrored.

    Args:
      a, b: uint8 RGB [p, s, s, 3], the two sides of p pairs.

    Returns:
      ([p] cosine of the `fingerprints`, 1 = the same photograph; [p] whether the mirror image is the one that is alike).
    """
    one, other, turned = fingerprints(a), fingerprints(b), fingerprints(b[:, :, ::-1])
    plain = np.einsum("pd,pd->p", one, other).astype(np.float32)
    mirrored = np.einsum("pd,pd->p", one, turned).astype(np.float32)
    return np.maximum(plain, mirrored), mirrored > plain


def degraded(crop: Crops) -> Crops:
    """A copy as they are met: cut a little tighter, at 60 % of the size, compressed as JPEG of quality 50."""
    size = crop.shape[0]
    edge = 0.015 * size
    small = Image.fromarray(crop).resize(
        (round(0.6 * size),) * 2, Image.Resampling.BILINEAR, box=(edge, edge, size - edge, size - edge)
    )
    file = io.BytesIO()
    small.save(file, "JPEG", quality=50)
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def shrunk(crops: Crops) -> Crops:
    """[k, SIDE, SIDE, 3] of crops of any size."""
    small = [Image.fromarray(crop).resize((SIDE, SIDE), Image.Resampling.BOX) for crop in crops]
    return np.stack([np.asarray(image) for image in small])

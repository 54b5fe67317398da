"""Photos of the plan, cropped: from uint8 memory where the set fits, else read by grain as they are used.

Both ways give the same batches, and a batch depends on the step alone, so resuming needs nothing but the step.
"""

import concurrent.futures
import functools
import os
import threading
from collections.abc import Iterator

import numpy as np

from faceembed.data import sampling, sources
from faceembed.preprocess import crop_side, crop_square


def batches(
    photos: sources.Photos,
    sampler: sampling.Sampler,
    *,
    size: int,
    margin: float = 1.0,
    start_step: int = 0,
    steps: int,
    process: int = 0,
    processes: int = 1,
    memory_limit_bytes: float = 4e9,
    decoded: np.ndarray | None = None,
    progress: bool = True,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of the batches of steps start_step, …, steps - 1.

    Args:
      photos: what `sampler` was made for: `make_sampler(photos.identity, …)`.
      sampler: the plan.
      size: side of the crops at margin 1, pixels.
      margin: enlarges crops around the square, for augmentation to move within.
      start_step: first step wanted.
      steps: steps in all; the iterator ends before this one.
      process: 0 ≤ process < processes; reads only the `sampling.share` of each batch that is its own.
      processes: divides the batch.
      memory_limit_bytes: a set whose crops take no more is decoded once, by this call.
      decoded: `decode_all(photos, size, margin)` where it is at hand already.
      progress: show a bar while decoding.

    Yields:
      {"image": uint8 [b, s, s, 3], "identity": int32 [b], "index": int32 [b] into photos, "slot": int32 [b] place in
      the whole batch}, b = P·K / processes, s = crop_side(size, margin).

    Raises:
      ValueError: if the plan and the photos do not belong together, or a photo does not decode (it is named).
    """
    side = crop_side(size, margin)
    if len(sampler.order) != len(photos):
        raise ValueError(
            f"the plan is for {len(sampler.order)} photos, but the source has {len(photos)}: "
            "use make_sampler(photos.identity, …)."
        )
    slots = sampling.share(np.arange(sampler.size, dtype=np.int32), process, processes)
    if decoded is not None and decoded.shape != (len(photos), side, side, 3):
        raise ValueError(
            f"decoded is {decoded.shape}, expected {(len(photos), side, side, 3)} for size {size} and margin {margin}."
        )
    if decoded is None and fits_in_memory(len(photos), size, margin, memory_limit_bytes):
        decoded = decode_all(photos, size, margin, progress=progress)
    if decoded is None:
        return _read_as_used(photos, sampler, size, margin, start_step, steps, slots)
    return _from_memory(photos, sampler, decoded, start_step, steps, slots)


def fits_in_memory(photos: int, size: int, margin: float, limit_bytes: float) -> bool:
    """Whether the uint8 crops of so many photos take at most `limit_bytes`."""
    return photos * crop_side(size, margin) ** 2 * 3 <= limit_bytes


def decode_all(
    photos: sources.Photos, size: int, margin: float = 1.0, *, progress: bool = True, threads: int | None = None
) -> np.ndarray:
    """Every photo's crop.

    Args:
      photos: any.
      size: side of the crops at margin 1, pixels.
      margin: enlarges crops around the square.
      progress: show a bar.
      threads: that decode at once; None takes two a processor.

    Returns:
      uint8 RGB [n, s, s, 3], s = crop_side(size, margin).

    Raises:
      ValueError: naming the photos that do not decode.
    """
    side = crop_side(size, margin)
    crops = np.empty((len(photos), side, side, 3), np.uint8)

    def fill(index: int) -> str | None:
        try:
            crops[index] = _crop(photos, index, size, margin)
        except ValueError as error:
            return str(error)
        return None

    with concurrent.futures.ThreadPoolExecutor(threads or 2 * (os.cpu_count() or 1)) as pool:
        outcomes = pool.map(fill, range(len(photos)))
        watched = sources.progress_bar(outcomes, len(photos), "decoding", shown=progress)
        failures = [failure for failure in watched if failure]
    if failures:
        more = f"\n  and {len(failures) - 10} more" if len(failures) > 10 else ""
        raise ValueError(
            f"{len(failures)} of {len(photos)} photos of {photos.source} do not decode:\n  "
            + "\n  ".join(failures[:10])
            + more
        )
    return crops


def _crop(photos: sources.Photos, index: int, size: int, margin: float) -> np.ndarray:
    """One photo's crop; a ValueError names the photo."""
    try:
        photo = photos.read(index)
        square = photos.square_in(photo.shape[1])
        return crop_square(photo, square, size, margin)
    except (OSError, ValueError) as error:
        raise ValueError(f"{photos.keys[index]}: {error}") from error


def _from_memory(
    photos: sources.Photos, sampler: sampling.Sampler, crops: np.ndarray, start: int, steps: int, slots: np.ndarray
) -> Iterator[dict[str, np.ndarray]]:
    for step in range(start, steps):
        index = sampler.batch(step)[slots]
        yield {"image": crops[index], "identity": photos.identity[index], "index": index, "slot": slots}


def _read_as_used(
    photos: sources.Photos,
    sampler: sampling.Sampler,
    size: int,
    margin: float,
    start: int,
    steps: int,
    slots: np.ndarray,
) -> Iterator[dict[str, np.ndarray]]:
    import grain

    # grain's threads ask for single photos; the step's plan is made once for all of them. The lock is for those that ask
    # while it is being made: the cache alone would let each make its own.
    remembered, lock = functools.lru_cache(maxsize=64)(sampler.batch), threading.Lock()

    def plan(step: int) -> np.ndarray:
        with lock:
            return remembered(step)

    def read(place: int) -> dict[str, np.ndarray]:
        step, slot = start + place // len(slots), slots[place % len(slots)]
        index = plan(step)[slot]
        image = _crop(photos, int(index), size, margin)
        return {"image": image, "identity": photos.identity[index], "index": index, "slot": slot}

    # Threads rather than worker processes: those deal photos round-robin and tear P×K batches apart.
    places = grain.MapDataset.source(_Places(max(0, steps - start) * len(slots))).map(read)
    threads = 4 * (os.cpu_count() or 1)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * len(slots) + threads)
    return iter(places.to_iter_dataset(options).batch(len(slots), drop_remainder=True))


class _Places:
    """0, 1, …, count - 1 as a grain source."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> int:
        return int(place)

"""Photos of the plan, cropped: from uint8 memory where the set fits, else read by grain as they are used.

Both ways give the same batches, and a batch depends on the step alone, so resuming needs nothing but the step.

A photo that does not read any more (`StandIns`) is replaced by the next of the same person that does, wherever it comes.
"""

import concurrent.futures
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from faceembed.data import sampling, sources
from faceembed.preprocess import crop_side, crop_square


class Undecodable(ValueError):
    """More photos than are allowed do not decode; the message names them."""


class StandIns:
    """Photos that do not decode, and which others are shown in their place.

    Another of the same person, the next one that decodes, going round; a photo of the next person, under that person's
    identity, where none of them does. That follows from the photo alone, so it is the same on any number of devices and
    after an interruption. Once a photo has failed it is not asked for again.

    Args:
      photos: any; people have neighbouring places.
      limit: more photos than this that do not decode are an error.
      known: keys of photos that failed under an earlier command.
    """

    def __init__(self, photos: sources.Photos, limit: int = 0, known: Iterable[str] = ()) -> None:
        self._photos, self._limit = photos, limit
        failed = set(known)
        self._why = {index: "" for index, key in enumerate(photos.keys) if str(key) in failed} if failed else {}
        self._step = dict.fromkeys(self._why, 0)
        self._untold: set[int] = set()
        self._lock = threading.Lock()

    def of(self, index: int) -> Iterator[int]:
        """The photo itself, then who stands in for it, in order; those that are known to fail are passed over."""
        first, last = np.searchsorted(self._photos.identity, self._photos.identity[index] + np.arange(2))
        everyone = range(index, last), range(first, index), range(last, len(self._photos)), range(first)
        return (int(other) for other in itertools.chain(*everyone) if other not in self._why)

    def shown(self, index: np.ndarray) -> np.ndarray:
        """[b] int32 photos, those that are known to fail replaced."""
        if not self._why:
            return index
        return np.array([next(self.of(int(one))) for one in index], index.dtype)

    def failed(self, why: dict[int, str], step: int) -> None:
        """Takes note of photos.

        Args:
          why: photo → what is wrong, with its key.
          step: the batch that they were needed for, from 0.

        Raises:
          Undecodable: they are too many; all are named.
        """
        with self._lock:
            self._untold |= why.keys() - self._why.keys()
            self._why |= why
            for index in why:  # photos are read ahead, and not in order
                self._step[index] = min(step, self._step.get(index, step))
            found = dict(sorted(self._why.items()))
        if len(found) <= min(self._limit, len(self._photos) - 1):
            return
        lines = [
            text or f"{self._photos.keys[index]}: failed under an earlier command" for index, text in found.items()
        ]
        allowed = f", more than --skip-bad-photos {self._limit}" if self._limit else ""
        raise Undecodable(
            f"{len(lines)} of {len(self._photos)} photos of {self._photos.source} do not decode{allowed}:{listed(lines)}"
        )

    def news(self, step: int) -> list[tuple[int, str]]:
        """(batch, why) of the photos that failed since the last call and were needed for a batch before `step`."""
        with self._lock:
            told = sorted((self._step[index], self._why[index], index) for index in self._untold)
            told = [entry for entry in told if entry[0] < step]
            self._untold -= {index for _, _, index in told}
        return [(at, why) for at, why, _ in told]

    def found(self, step: int) -> list[tuple[int, int, str]]:
        """(batch, photo, why) of all that failed and were needed for a batch before `step`, for `failed` elsewhere."""
        with self._lock:
            return [(at, index, self._why[index]) for index, at in sorted(self._step.items()) if at < step]

    def keys(self, step: int) -> list[str]:
        """Keys of all that failed and were needed for a batch before `step`; what `known` takes."""
        with self._lock:
            return [str(self._photos.keys[index]) for index in sorted(self._why) if self._step[index] < step]


def listed(lines: Sequence[str]) -> str:
    """The first ten, each on a line of its own, and how many more there are."""
    more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
    return "".join(f"\n  {line}" for line in [*lines[:10], *more])


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
    stand_ins: StandIns | None = None,
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
      stand_ins: for photos that do not decode; None allows none.
      progress: show a bar while decoding.

    Yields:
      {"image": uint8 [b, s, s, 3], "identity": int32 [b], "index": int32 [b] into photos, "slot": int32 [b] place in
      the whole batch}, b = P·K / processes, s = crop_side(size, margin). Identity and index are those of what is shown.

    Raises:
      ValueError: if the plan and the photos do not belong together, or more photos do not decode than `stand_ins` allows
        (they are named).
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
    stand_ins = stand_ins or StandIns(photos)
    if decoded is None and fits_in_memory(len(photos), size, margin, memory_limit_bytes):
        decoded = decode_all(photos, size, margin, stand_ins=stand_ins, step=start_step, progress=progress)
    if decoded is None:
        return _read_as_used(photos, sampler, size, margin, start_step, steps, slots, stand_ins)
    return _from_memory(photos, sampler, decoded, start_step, steps, slots, stand_ins)


def fits_in_memory(photos: int, size: int, margin: float, limit_bytes: float) -> bool:
    """Whether the uint8 crops of so many photos take at most `limit_bytes`."""
    return photos * crop_side(size, margin) ** 2 * 3 <= limit_bytes


def decode_all(
    photos: sources.Photos, size: int, margin: float = 1.0, *, stand_ins: StandIns | None = None, step: int = 0,
    progress: bool = True, threads: int | None = None,
) -> np.ndarray:  # fmt: skip
    """Every photo's crop.

    Args:
      photos: any.
      size: side of the crops at margin 1, pixels.
      margin: enlarges crops around the square.
      stand_ins: takes note of photos that do not decode, whose crops are black; None allows none.
      step: the batch that they are noted for.
      progress: show a bar.
      threads: that decode at once; None takes two a processor.

    Returns:
      uint8 RGB [n, s, s, 3], s = crop_side(size, margin).

    Raises:
      Undecodable: naming the photos that do not decode, if they are more than `stand_ins` allows.
    """
    side = crop_side(size, margin)
    crops = np.zeros((len(photos), side, side, 3), np.uint8)
    stand_ins = stand_ins or StandIns(photos)

    def fill(index: int) -> str | None:
        if next(stand_ins.of(index)) != index:
            return None  # it failed under an earlier command
        try:
            crops[index] = _crop(photos, index, size, margin)
        except ValueError as error:
            return str(error)
        return None

    if failures := _tried(fill, len(photos), "decoding", progress, threads):
        stand_ins.failed(failures, step)
    return crops


def undecodable(photos: sources.Photos, *, progress: bool = True) -> dict[str, str]:
    """Key → what is wrong, of the photos that do not decode; of the others nothing is kept."""

    def read(index: int) -> str | None:
        try:
            photos.read(index)
        except (OSError, ValueError) as error:
            return str(error)
        return None

    return {
        str(photos.keys[index]): why for index, why in _tried(read, len(photos), "checking photos", progress).items()
    }


def _tried(
    one: Callable[[int], str | None], count: int, what: str, progress: bool, threads: int | None = None
) -> dict[int, str]:
    """What went wrong, by photo, where `one` does something with each in threads and says what."""
    with concurrent.futures.ThreadPoolExecutor(threads or 2 * (os.cpu_count() or 1)) as pool:
        outcomes = pool.map(one, range(count))
        return {
            index: why for index, why in enumerate(sources.progress_bar(outcomes, count, what, shown=progress)) if why
        }


def _crop(photos: sources.Photos, index: int, size: int, margin: float) -> np.ndarray:
    """One photo's crop; a ValueError names the photo."""
    try:
        photo = photos.read(index)
        square = photos.square_in(photo.shape[1])
        return crop_square(photo, square, size, margin)
    except (OSError, ValueError) as error:
        raise ValueError(f"{photos.keys[index]}: {error}") from error


def _from_memory(
    photos: sources.Photos,
    sampler: sampling.Sampler,
    crops: np.ndarray,
    start: int,
    steps: int,
    slots: np.ndarray,
    stand_ins: StandIns,
) -> Iterator[dict[str, np.ndarray]]:
    for step in range(start, steps):
        index = stand_ins.shown(sampler.batch(step)[slots])
        yield {"image": crops[index], "identity": photos.identity[index], "index": index, "slot": slots}


def _read_as_used(
    photos: sources.Photos,
    sampler: sampling.Sampler,
    size: int,
    margin: float,
    start: int,
    steps: int,
    slots: np.ndarray,
    stand_ins: StandIns,
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
        planned = plan(step)[slot]
        for index in stand_ins.of(int(planned)):
            try:
                image = _crop(photos, index, size, margin)
            except ValueError as error:
                stand_ins.failed({index: str(error)}, step)
            else:
                return {"image": image, "identity": photos.identity[index], "index": np.int32(index), "slot": slot}
        raise AssertionError("`failed` raises before every photo has failed")

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

"""The P×K plan: which photos are in the batch of a step, a pure function of (seed, step).

The rule, for batches of B = P·K photos:

1. An epoch lists everybody with two photos or more in an order drawn for (seed, epoch). The list is cut into E runs of
   about equal numbers of photos, E the same in every epoch, and nobody is divided: step t takes run t mod E of epoch
   t // E. Each person gives min(K, photos they have). Where everybody has K photos or more and E·P people exist, that
   is exactly P people × K photos.
2. Singletons (people with one photo) can only be negatives. They follow one another in a fixed order drawn for the
   seed, at most ⌊singletons·B⌋ a batch and at most each once an epoch.
3. What is still free (runs are a little shorter than a batch, so that whole people fit) is filled by people from half
   an epoch away in the list; the last of these gives as many photos as fit.

So a batch always has exactly B photos, all different, and a photo is never its own positive. Nobody starves: everybody
with two photos or more is in some batch of every epoch; each ⌈c/K⌉ epochs show all photos of a person who has c, in an
order drawn anew each time around; a singleton comes again within `Sampler.singleton_period` steps.

Draws are SplitMix64 hashes (Steele, Lea & Flood 2014) sorted stably, rather than a library's generator, whose stream
may change with its version.
"""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sampler:
    """Tables for the P×K plan; `make_sampler` builds them. Holds no position: ask for any step."""

    people: int
    """P."""
    photos: int
    """K."""
    seed: int
    order: np.ndarray
    """[n] int32, photo indices sorted by person."""
    start: np.ndarray
    """[m] int32, where a person with two photos or more begins in `order`."""
    count: np.ndarray
    """[m] int32, photos of that person, ≥ 2."""
    singletons: np.ndarray
    """[s] int32, photos of people who have one, in the order they are visited."""
    epoch_steps: int
    """E, batches an epoch."""
    run: int
    """Photos in a run of the epoch's list, on average."""
    epoch_singletons: int
    """R, singletons shown in E steps."""
    _recent: list[tuple[int, np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list, init=False, repr=False)
    """What `_epoch` gave for the last two epochs that were asked for, with their numbers."""

    @property
    def size(self) -> int:
        """B = P·K, photos in a batch."""
        return self.people * self.photos

    @property
    def singleton_period(self) -> int:
        """Every singleton is in some batch of any so many consecutive steps; 0 if they are never shown."""
        if not self.epoch_singletons:
            return 0
        return -(-len(self.singletons) * self.epoch_steps // self.epoch_singletons)

    def batch(self, step: int) -> np.ndarray:
        """Photos of one step.

        Args:
          step: 0 or more; any step costs the same, whatever was asked before.

        Returns:
          [P·K] int32 photo indices, all different; a person's photos are neighbours.
        """
        if step < 0:
            raise ValueError(f"step is {step}: steps count from 0.")
        epoch, place = divmod(step, self.epoch_steps)
        listed, begins = self._epoch(epoch)

        # The last run may end beyond the list. Numbers of the list's type, or all of it would be converted to find them.
        ends = np.minimum([place * self.run, (place + 1) * self.run], len(self.order)).astype(begins.dtype)
        first, last = map(int, np.searchsorted(begins, ends))
        singles = np.arange(
            step * self.epoch_singletons // self.epoch_steps, (step + 1) * self.epoch_singletons // self.epoch_steps
        )
        chosen = listed[first:last]
        gives = np.minimum(self.count[chosen], self.photos)
        free = self.size - int(gives.sum()) - len(singles)

        # Places of the others in the list, from half an epoch away on; it goes around, and leaves this run out. Everybody
        # gives one photo at least, so `free` people are enough to fill `free` places.
        across, others = (first + len(listed) // 2) % len(listed), len(listed) - (last - first)
        turn = across if across < first else max(first, across - (last - first))
        fillers = (turn + np.arange(min(free, others))) % max(others, 1)
        fillers = listed[fillers + (last - first) * (fillers >= first)]
        filling = np.minimum(self.count[fillers], self.photos)
        room = free - (np.cumsum(filling) - filling)
        fillers, filling, room = fillers[room > 0], filling[room > 0], room[room > 0]

        chosen = np.concatenate([chosen, fillers])
        amount = np.concatenate([gives, np.minimum(filling, room)])
        # Who fills a gap comes twice in this epoch, so shows the photos of the next one rather than the same again.
        visit = np.concatenate([np.full(last - first, epoch), np.full(len(fillers), epoch + 1)])
        of_people = self._photos(chosen, amount, visit)
        of_singles = self.singletons[singles % len(self.singletons)] if len(singles) else self.singletons[:0]
        return np.concatenate([of_people, of_singles]).astype(np.int32)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's list: people, and photos given before each; [m] int32 each.

        Steps are asked for almost in turn, by threads that read ahead into the next epoch: two are remembered.
        """
        for number, listed, begins in self._recent:
            if number == epoch:
                return listed, begins
        listed = np.argsort(draw(self.seed, 1, epoch, np.arange(len(self.count))), kind="stable").astype(np.int32)
        gives = np.minimum(self.count[listed], self.photos)
        begins = (np.cumsum(gives) - gives).astype(np.int32)
        # At once, for threads that look meanwhile.
        self._recent[:] = [(epoch, listed, begins), *self._recent[:1]]
        return listed, begins

    def _photos(self, person: np.ndarray, amount: np.ndarray, visit: np.ndarray) -> np.ndarray:
        """`amount` photos of each person, those whose turn it is at the given visit; [sum(amount)] int32."""
        count = self.count[person]
        cycle, turn = np.divmod(visit, -(-count // self.photos))
        # In as few bytes as it takes: up to two, a stable sort is a radix sort.
        owner = np.repeat(np.arange(len(person), dtype=np.min_scalar_type(len(person))), count)
        offset = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
        photo = self.order[self.start[person][owner] + offset]
        drawn = np.argsort(draw(self.seed, 2, cycle[owner], photo), kind="stable")
        shuffled = photo[drawn[np.argsort(owner[drawn], kind="stable")]]
        # `shuffled` holds each person's photos in this cycle's order; a visit is a window that wraps around.
        place = (offset - turn[owner] * self.photos) % count[owner]
        keep = place < amount[owner]
        return shuffled[keep]


def make_sampler(identity: np.ndarray, *, people: int, photos: int, seed: int, singletons: float = 0.1) -> Sampler:
    """Tables for the P×K plan of a set of photos.

    Ten million photos of a million people, sorted by person, take 0.2 s and 90 MB, of which the plan keeps 65.

    Args:
      identity: [n] int, person of each photo; n < 2³¹.
      people: P ≥ 2.
      photos: K ≥ 2, photos of each person in a batch.
      seed: 0 or more.
      singletons: largest share of a batch given to people with one photo, 0 ≤ singletons < 1. They make negatives only,
        so a tenth by default: in a set where most people have one photo, more would leave few positives.

    Raises:
      ValueError: if nobody has two photos, the set cannot fill a batch without repeating a photo, or is too large for
        int32.
    """
    identity = np.asarray(identity)
    if identity.ndim != 1 or not np.issubdtype(identity.dtype, np.integer):
        raise ValueError(f"identity is {identity.dtype} {identity.shape}: expected integers [n], the person of each.")
    if len(identity) > np.iinfo(np.int32).max:
        raise ValueError(f"{len(identity):,} photos are more than a plan numbers, {np.iinfo(np.int32).max:,}.")
    if people < 2 or photos < 2:
        raise ValueError(
            f"people × photos is {people} × {photos}: below 2 × 2 a batch has no positive or no negative. "
            "Try --batch.people 32 --batch.photos 4."
        )
    if not 0 <= singletons < 1:
        raise ValueError(f"singletons is {singletons}: it is a share of the batch, 0 ≤ share < 1. Try 0.1.")
    if (identity[1:] >= identity[:-1]).all():  # as a source's are
        order, ordered = np.arange(len(identity), dtype=np.int32), identity
    else:
        order = np.argsort(identity, kind="stable").astype(np.int32)
        ordered = identity[order]
    begins = np.ones(len(ordered), bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    start = np.flatnonzero(begins).astype(np.int32)
    count = np.diff(start, append=np.int32(len(ordered)))
    alone = order[start[count == 1]]
    alone = alone[np.argsort(draw(seed, 0, 0, alone), kind="stable")]
    start, count = start[count > 1], count[count > 1]
    if not len(count):
        raise ValueError(
            f"nobody of {len(alone)} people has two photos: no anchor has a positive. Add photos of the same people."
        )

    size = people * photos
    gives = np.minimum(count, photos)
    total, unit = int(gives.sum()), int(np.gcd.reduce(gives))
    cap = min(int(singletons * size), size - 2 * photos)
    if total <= size:
        # Everybody is in every batch.
        steps, run, shown = 1, total, size - total
        if shown > min(cap, len(alone)):
            raise ValueError(
                f"a batch of {people} people × {photos} photos needs {size} photos, but at {photos} a person the "
                f"{len(count)} people with two photos or more give {total} and singletons {min(cap, len(alone))}. "
                + _advice(count, people, photos)
            )
    else:
        # Whole people overhang a run's end by up to K - unit photos; singletons need their places too. The more places
        # singletons get, the longer the epoch and the fewer of them a batch needs: take the first number that suffices.
        for places in range(cap + 1):
            longest = (size - places - (photos - unit)) // unit * unit
            steps = -(-total // longest)
            if places == cap or -(-len(alone) // steps) <= places:
                break
        shown = min(len(alone), places * steps)
        run = -(-total // (steps * unit)) * unit
    return Sampler(
        people=people, photos=photos, seed=seed, order=order, start=start, count=count, singletons=alone,
        epoch_steps=steps, run=run, epoch_singletons=shown,
    )  # fmt: skip


def _advice(count: np.ndarray, people: int, photos: int) -> str:
    """What to type where people with `count` photos [m], 2 or more each, cannot fill people × photos."""
    for fewer in range(photos, 1, -1):
        enough = int(np.minimum(count, fewer).sum()) // fewer
        if enough >= 2:
            flags = [f"--batch.people {enough}"] if enough < people else []
            flags += [f"--batch.photos {fewer}"] if fewer < photos else []
            return f"Try {' '.join(flags)}."
    return "Add photos of other people: two with two photos each make the smallest batch."


def plan(
    identity: np.ndarray, *, people: int, photos: int, seed: int, step: int, singletons: float = 0.1
) -> np.ndarray:
    """Photos of one step: `make_sampler(...).batch(step)`. Returns [P·K] int32 indices into `identity`."""
    return make_sampler(identity, people=people, photos=photos, seed=seed, singletons=singletons).batch(step)


def share(index: np.ndarray, process: int, processes: int) -> np.ndarray:
    """The contiguous part of a batch that one of several processes reads.

    Args:
      index: [b] photo indices, or anything else in the batch's order.
      process: 0 ≤ process < processes.
      processes: divides b.

    Returns:
      [b / processes].
    """
    if not 0 <= process < processes:
        raise ValueError(f"process is {process} of {processes}: expected 0 to {processes - 1}.")
    if len(index) % processes:
        raise ValueError(
            f"a batch of {len(index)} photos does not divide over {processes} processes; "
            f"make --batch.people × --batch.photos a multiple of {processes}."
        )
    part = len(index) // processes
    return index[process * part : (process + 1) * part]


def draw(*words: Any) -> np.ndarray:
    """Uniform uint64, a function of the words (int or int arrays that broadcast)."""
    state = np.zeros(np.broadcast_shapes(*(np.shape(word) for word in words)), np.uint64)
    for word in words:
        # uint64 arithmetic on arrays wraps, as SplitMix64 wants.
        state = (state ^ np.asarray(word).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state

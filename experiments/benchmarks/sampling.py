"""How soon does a set of ten million photos of a million people give its first batch, and the next?  (1 min on 2 cores.)

    python -m experiments.benchmarks.sampling

The sets are metadata alone: who is on each photo and what it is called, nothing that could be decoded. People have photos
as the Zipf-Mandelbrot law has it: a tenth of them one, half of them three or fewer, one in seventy 100 to 453.

The plan: `start` is `make_sampler` and the first batch; `batch`, one of the same epoch; `epoch`, one of an epoch that was
not asked for before, which is what any step far away costs. MB is the most that the plan and its batches over three epochs
hold at once beyond the list of who is on each photo. Batches are of 4 photos a person.

On the way: what a training does between opening a prepared source and its first batch, once each, in turn; MB is the most
that a step needs beyond what was there before. The names and keys themselves, 4 bytes a character and a second time for
the parts of the split, are most of it. Photos of the pairs that choose the best checkpoint are decoded besides, at most
16,000 whatever the size of the set.

Bars, at ten million: 5 s and 1500 MB to start, 500 ms for an epoch, and 2 ms for a batch of 256.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks import harness
from experiments.benchmarks.search import megabytes
from faceembed.data import pairs, sampling, sources

SETS = ((1_000_000, 100_000), (10_000_000, 1_000_000))
"""Photos and people."""
BATCHES = (256, 4096, 65_536)
PHOTOS = 4
CHUNK = 1_000_000
LEFT_OUT = 1000


def who(photos: int, people: int) -> np.ndarray:
    """[photos] int32, the person of each, ascending; `people` ≥ 2000 of them, ten photos each on average.

    The person of rank r has about C / (r + people / 250) photos; large and small come in no order.
    """
    rank, offset = np.arange(people), people // 250
    count = int(photos / math.log(251)) // (rank + offset)
    count[: photos - count.sum()] += 1  # what rounding down has left
    return np.repeat(rank.astype(np.int32), count[np.argsort(sampling.draw(rank), kind="stable")])


def metadata(photos: int, people: int) -> sources.Photos:
    """Photos that cannot be read."""
    identity = who(photos, people)
    names = np.array([f"person_{person:07d}" for person in range(people)])
    place = np.arange(photos) - np.searchsorted(identity, identity)
    keys = np.empty(photos, f"U{len(names[0]) + 6}")
    for start in range(0, photos, CHUNK):
        some = zip(names[identity[start : start + CHUNK]].tolist(), place[start : start + CHUNK].tolist(), strict=True)
        keys[start : start + CHUNK] = [f"{name}/{number:05d}" for name, number in some]
    return sources.Photos(
        source="simulated", keys=keys, identity=identity, people=names, read=_unreadable, square=None, problems=(),
        fingerprint="simulated",
    )  # fmt: skip


def _unreadable(index: int) -> np.ndarray:
    raise ValueError(f"photo {index} is simulated: there is nothing to decode.")


# --- The plan


def make(identity: np.ndarray, size: int) -> sampling.Sampler:
    """The plan of batches of `size`."""
    return sampling.make_sampler(identity, people=size // PHOTOS, photos=PHOTOS, seed=0)


def planning(photos: int, people: int, size: int) -> Callable[[], object]:
    """A call that makes a plan and asks for batches of three epochs."""
    identity = who(photos, people)

    def call() -> None:
        sampler = make(identity, size)
        for epoch in range(3):
            sampler.batch(epoch * sampler.epoch_steps)

    return call


def timed(photos: int, people: int, size: int, repeats: int) -> dict[str, Any]:
    """A row of the plan's times."""
    identity = who(photos, people)
    sampler = make(identity, size)
    asked = {"batch": 0, "epoch": 0}

    def start() -> None:
        make(identity, size).batch(0)

    def batch() -> None:
        asked["batch"] += 1
        sampler.batch(asked["batch"] % sampler.epoch_steps)

    def epoch() -> None:
        asked["epoch"] += 1
        sampler.batch(asked["epoch"] * sampler.epoch_steps)

    times = harness.interleave({"start": start, "batch": batch, "epoch": epoch}, repeats=repeats)
    middle = {name: harness.summary(seconds).median for name, seconds in times.items()}
    return {
        "start s": middle["start"], "batch ms": 1e3 * middle["batch"], "µs a photo": 1e6 * middle["batch"] / size,
        "epoch ms": 1e3 * middle["epoch"], "batches an epoch": sampler.epoch_steps,
    }  # fmt: skip


# --- On the way


def on_the_way(photos: int, people: int) -> list[dict[str, Any]]:
    """A row for each thing that a training does before its first batch."""
    from faceembed import evaluate  # JAX: the plan is measured without
    from faceembed.training import loop

    everybody = metadata(photos, people)
    lines = everybody.keys[:: max(1, photos // LEFT_OUT)].tolist()
    rows = []

    def step(name: str, call: Callable[[], Any]) -> Any:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before, began = megabytes("VmRSS"), time.perf_counter()
        found = call()
        seconds, peak = time.perf_counter() - began, megabytes("VmHWM")
        rows.append({"step": name, "s": seconds, "MB": None if before is None or peak is None else peak - before})
        return found

    step("fingerprint of the source", lambda: sources.fingerprint_of(everybody.keys, everybody.people, ""))
    parts = step("people split", lambda: evaluate.split_photos(everybody))
    named = step(f"{len(lines):,} photos named to leave out", lambda: sources.named(lines, everybody, ""))
    learn, _ = step("and left out", lambda: loop.leave_out(named, everybody, parts["train"]))
    sampler = step("plan", lambda: make(learn.identity, BATCHES[0]))
    step("first batch", lambda: sampler.batch(0))
    chosen = step("pairs of select people", lambda: pairs.heldout(parts["select"], "select"))
    step("their photos", lambda: pairs.resolve(chosen, parts["select"]))
    hashes = step("hashes of training people", lambda: [evaluate.person_hash(person) for person in learn.people])
    text = step("as JSON, in each checkpoint", lambda: json.dumps(hashes))
    rows[-1]["file MB"] = len(text) / 1e6
    return rows


def run(*, quick: bool = False) -> list[dict[str, Any]]:
    """A row for each set and batch, and for each step on the way."""
    rows: list[dict[str, Any]] = []
    for photos, people in ((20_000, 2000),) if quick else SETS:
        for size in (64,) if quick else BATCHES:
            row = {"table": "the plan", "photos": photos, "people": people, "batch": size}
            row |= harness.fresh(timed, photos, people, size, 2 if quick else 7)
            peak = harness.peak_bytes(planning, photos, people, size)
            rows.append(row | {"MB": None if peak is None else peak / 1e6})
    for photos, people in ((20_000, 2000),) if quick else SETS[-1:]:
        table = f"on the way, {photos:,} photos of {people:,} people"
        rows += [{"table": table, **row} for row in harness.fresh(on_the_way, photos, people)]
    return rows


if __name__ == "__main__":
    harness.main(run)

"""The P×K plan against the promises in its module's docstring."""

import gc
import hashlib
import re
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from experiments.benchmarks import harness
from experiments.benchmarks import sampling as benchmark
from faceembed.data import sampling


def people_of(counts, seed=0):
    """Identities with so many photos each, shuffled."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int32)


def photos_by_person(identity, index):
    return {int(person): index[identity[index] == person] for person in np.unique(identity[index])}


@st.composite
def sets(draw):
    """(identity, sampler) of long-tailed sets, wherever they fill a batch."""
    counts = draw(st.lists(st.integers(1, 9), min_size=3, max_size=60))
    identity = people_of(counts, draw(st.integers(0, 99)))
    try:
        sampler = sampling.make_sampler(
            identity,
            people=draw(st.integers(2, 6)),
            photos=draw(st.integers(2, 5)),
            seed=draw(st.integers(0, 2**31 - 1)),
            singletons=draw(st.sampled_from([0.0, 0.1, 0.3, 0.9])),
        )
    except ValueError:
        assume(False)
    return identity, sampler


@settings(deadline=None, max_examples=150)
@given(sets(), st.integers(0, 10**6))
def test_a_batch_is_whole_and_never_repeats_a_photo(drawn, step):
    identity, sampler = drawn
    index = sampler.batch(step)
    assert index.dtype == np.int32
    assert index.shape == (sampler.people * sampler.photos,)
    assert len(set(index.tolist())) == len(index)
    total = np.bincount(identity)
    given_less = 0
    for person, photos in photos_by_person(identity, index).items():
        assert len(photos) <= sampler.photos
        given_less += len(photos) < min(sampler.photos, total[person])
        places = np.flatnonzero(identity[index] == person)
        assert np.all(np.diff(places) == 1), "a person's photos are neighbours"
    assert given_less <= 1, "only the last who fills the batch may give less than they have"


@settings(deadline=None, max_examples=100)
@given(sets(), st.integers(0, 50))
def test_nobody_starves(drawn, epoch):
    identity, sampler = drawn
    counts = np.bincount(identity)
    steps = range(epoch * sampler.epoch_steps, (epoch + 1) * sampler.epoch_steps)
    seen = np.concatenate([sampler.batch(step) for step in steps])
    assert set(np.flatnonzero(counts > 1)) <= set(identity[seen].tolist())

    # From any multiple of ⌈c/K⌉ epochs on, that many epochs show all c photos.
    for person in np.flatnonzero(counts > 1)[:5]:
        cycle = -(-counts[person] // sampler.photos)
        first = epoch // cycle * cycle
        steps = range(first * sampler.epoch_steps, (first + cycle) * sampler.epoch_steps)
        seen = {int(photo) for step in steps for photo in sampler.batch(step)}
        assert set(np.flatnonzero(identity == person)) <= seen

    if sampler.singleton_period:
        start = epoch * 7
        window = [sampler.batch(step) for step in range(start, start + sampler.singleton_period)]
        assert set(np.flatnonzero(counts == 1)) <= set(identity[np.concatenate(window)].tolist())


@settings(deadline=None, max_examples=100)
@given(sets(), st.integers(0, 500))
def test_singletons_keep_to_their_share(drawn, step):
    identity, sampler = drawn
    alone = (np.bincount(identity) == 1)[identity[sampler.batch(step)]]
    epoch = step // sampler.epoch_steps * sampler.epoch_steps
    whole = np.concatenate([sampler.batch(s) for s in range(epoch, epoch + sampler.epoch_steps)])
    shown = np.bincount(whole[(np.bincount(identity) == 1)[identity[whole]]], minlength=1)
    if sampler.epoch_steps > 1:
        assert shown.max() <= 1, "a singleton comes at most once an epoch"
    assert alone.sum() <= 0.9 * sampler.size


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.25])
def test_singletons_fill_their_share_where_they_abound(share):
    identity = people_of([2] * 300 + [1] * 3000)
    sampler = sampling.make_sampler(identity, people=16, photos=4, seed=1, singletons=share)
    alone = np.bincount(identity) == 1
    number = [alone[identity[sampler.batch(step)]].sum() for step in range(200)]
    assert set(number) == {int(share * 64)}


def test_few_singletons_are_not_shown_over_and_over():
    identity = people_of([4] * 200 + [1] * 3)
    sampler = sampling.make_sampler(identity, people=8, photos=4, seed=1)
    index = np.concatenate([sampler.batch(step) for step in range(4 * sampler.epoch_steps)])
    alone = np.flatnonzero((np.bincount(identity) == 1)[identity])
    assert [int((index == photo).sum()) for photo in alone] == [4, 4, 4]


def test_enough_photos_make_exactly_p_times_k():
    identity = people_of([9] * 5 + [4] * 35)
    sampler = sampling.make_sampler(identity, people=8, photos=4, seed=3)
    assert sampler.epoch_steps == 5
    for step in range(20):
        photos = photos_by_person(identity, sampler.batch(step))
        assert [len(of) for of in photos.values()] == [4] * 8
    epoch = np.concatenate([sampler.batch(step) for step in range(5, 10)])
    assert np.bincount(identity[epoch]).tolist() == [4] * 40, "everybody once an epoch"


def test_a_step_is_a_function_of_seed_and_step():
    identity = people_of([1, 2, 3, 5, 8, 13] * 10)
    options = {"people": 8, "photos": 3}
    make = lambda seed: sampling.make_sampler(identity, seed=seed, **options)  # noqa: E731
    forwards, backwards = make(5), make(5)
    first = [forwards.batch(step) for step in range(40)]
    last = [backwards.batch(step) for step in reversed(range(40))][::-1]
    np.testing.assert_array_equal(first, last)
    np.testing.assert_array_equal(sampling.plan(identity, seed=5, step=33, **options), first[33])
    assert not np.array_equal(make(6).batch(33), first[33])
    # Another epoch brings other people together.
    company = [set(identity[forwards.batch(e * forwards.epoch_steps)].tolist()) for e in range(4)]
    assert all(company[0] != other for other in company[1:])
    # Written down once: the same on every machine and version, or resuming breaks.
    assert forwards.batch(1000)[:8].tolist() == [22, 19, 89, 44, 45, 194, 130, 86]


def long_tail(people, most):
    """[people] photos of each, 1 to `most`, half of them 1; of integers alone, so the same everywhere."""
    rank = (np.arange(people) * 7919 + 13) % 1000
    return 1 + rank**3 * (most - 1) // 999**3


def in_turns(counts):
    """Identities with so many photos each, scattered evenly."""
    identity = np.repeat(np.arange(len(counts)), counts)
    return identity[np.arange(len(identity)) * 1_000_003 % len(identity)]


GOLDEN = {
    "a long tail": (
        in_turns(long_tail(1000, 20)).astype(np.int32),
        {"people": 16, "photos": 4, "seed": 0},
        "f77a62834e43337b",
    ),
    "ids with gaps, some negative": (
        in_turns(long_tail(1000, 20)) * 37 - 9999,
        {"people": 16, "photos": 4, "seed": 1},
        "80168e3a413de84e",
    ),
    "sorted by person": (
        np.sort(in_turns(long_tail(1000, 20))).astype(np.int32),
        {"people": 16, "photos": 4, "seed": 2},
        "cdd3213b98e10dcc",
    ),
    "sorted the other way": (
        np.sort(in_turns(long_tail(1000, 20)))[::-1].astype(np.uint16),
        {"people": 16, "photos": 4, "seed": 2},
        "53cc23f14c02e0f6",
    ),
    "a few people with thousands": (
        in_turns(long_tail(50, 5000)),
        {"people": 8, "photos": 4, "seed": 3},
        "12d8537e6013c79f",
    ),
    "no singletons": (
        in_turns(long_tail(1000, 9) + 1),
        {"people": 16, "photos": 4, "seed": 4},
        "0f687b8754524ac0",
    ),
    "singletons left out": (
        in_turns(long_tail(1000, 9)),
        {"people": 16, "photos": 4, "seed": 5, "singletons": 0.0},
        "1aa948de2e143271",
    ),
    "singletons everywhere": (
        in_turns(long_tail(1000, 3)),
        {"people": 8, "photos": 4, "seed": 6, "singletons": 0.9},
        "06121a872ac6a244",
    ),
    "more photos than anybody has": (
        in_turns(long_tail(1000, 5)),
        {"people": 12, "photos": 9, "seed": 7},
        "1aba5feb01718850",
    ),
    "everybody in every batch": (
        in_turns([4] * 3 + [1] * 9),
        {"people": 4, "photos": 4, "seed": 8, "singletons": 0.3},
        "df9c1d2a3114729b",
    ),
    "two batches an epoch": (
        in_turns([3] * 4 + [5] * 6 + [1] * 4),
        {"people": 6, "photos": 5, "seed": 9},
        "1c1371ca24252564",
    ),
    "three batches an epoch": (
        in_turns([3] * 17 + [7] * 6 + [1] * 4),
        {"people": 8, "photos": 4, "seed": 2**31 - 1},
        "2c100c67f4dbf702",
    ),
    "a large batch": (
        in_turns(long_tail(20_000, 40)).astype(np.int32),
        {"people": 512, "photos": 8, "seed": 10},
        "843556e3dd79f4f1",
    ),
}


@pytest.mark.parametrize(("identity", "options", "digest"), GOLDEN.values(), ids=GOLDEN)
def test_the_sequence_of_batches_never_changes(identity, options, digest):
    """Written down once: a run that is resumed under another version goes on with the batches that it would have had."""
    sampler = sampling.make_sampler(identity, **options)
    far = 10**12 // sampler.epoch_steps * sampler.epoch_steps
    steps = [*range(120), *(far + step for step in (-1, 0, 1)), 10**15 + 7]
    found = hashlib.sha256(np.concatenate([sampler.batch(step) for step in steps]).astype("<i4").tobytes())
    assert found.hexdigest()[:16] == digest


def test_steps_in_any_order_give_the_same_batches():
    identity = in_turns(long_tail(200, 9))
    make = lambda: sampling.make_sampler(identity, people=8, photos=4, seed=0)  # noqa: E731
    sampler, epoch = make(), make().epoch_steps
    for step in (0, epoch, 5 * epoch, epoch + 1, 1, 5 * epoch + 2, 2, 0, 9 * epoch, 5 * epoch):
        np.testing.assert_array_equal(sampler.batch(step), make().batch(step))


def peak_of(call):
    """(what `call` returns, bytes that it held at once)."""
    gc.collect()
    tracemalloc.start()
    try:
        found = call()
        return found, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("ordered", [True, False])
def test_a_plan_is_small(ordered):
    """Beside the set's own list, of 4 bytes a photo, at most 10 or, where it has to be sorted, 17 a photo."""
    photos, people = 500_000, 50_000
    identity = benchmark.who(photos, people)
    if not ordered:
        identity = identity[np.arange(photos) * 1_000_003 % photos]

    def plan():
        sampler = sampling.make_sampler(identity, people=64, photos=4, seed=0)
        for epoch in range(6):
            sampler.batch(epoch * sampler.epoch_steps)
        return sampler

    sampler, peak = peak_of(plan)
    assert peak < (10 if ordered else 17) * photos
    held = [value for value in vars(sampler).values() if isinstance(value, np.ndarray)]
    held += [array for epoch in sampler._recent for array in epoch[1:]]
    assert {array.dtype for array in held} == {np.dtype(np.int32)}
    assert sum(array.nbytes for array in held) < 4 * photos + 24 * people + 1
    # It goes when nobody needs it any more: nothing else keeps it.
    gone = weakref.ref(sampler)
    del sampler, held
    gc.collect()
    assert gone() is None


def test_a_batch_needs_no_more_of_a_larger_set():
    """Once its epoch's list is there, people outside the batch take no memory, and so no time."""
    small, large = (
        sampling.make_sampler(in_turns([5] * people), people=16, photos=4, seed=0) for people in (2000, 64_000)
    )
    for sampler in (small, large):
        sampler.batch(0)
    (_, few), (_, many) = (peak_of(lambda sampler=sampler: sampler.batch(1)) for sampler in (small, large))
    assert many < 1.5 * few


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets the high-water mark")
@pytest.mark.parametrize(("size", "digest"), [(256, "e106447ccc95a79b"), (65_536, "ad8f47adf94093a9")])
def test_ten_million_photos_of_a_million_people(size, digest):
    # In a process of its own; `ru_maxrss` would be no less than this one's.
    assert harness.peak_bytes(benchmark.planning, 10_000_000, 1_000_000, size) < 200e6
    identity = benchmark.who(10_000_000, 1_000_000)
    sampler = benchmark.make(identity, size)
    epoch = sampler.epoch_steps
    batches = [sampler.batch(step) for step in (0, 1, epoch - 1, epoch, 7 * epoch + 3, 10**12)]
    assert hashlib.sha256(np.concatenate(batches).astype("<i4").tobytes()).hexdigest()[:16] == digest
    seen = np.concatenate([sampler.batch(step) for step in range(epoch, epoch + min(epoch, 300))])
    total = np.bincount(identity)
    _, times = np.unique(seen[total[identity[seen]] == 1], return_counts=True)
    assert times.max() == 1, "a singleton comes at most once an epoch"
    if size == 65_536:
        assert np.isin(np.flatnonzero(total > 1), identity[seen]).all(), "nobody starves"


def test_all_pairs_of_a_persons_photos_meet():
    identity = people_of([8] * 8)
    sampler = sampling.make_sampler(identity, people=4, photos=4, seed=0)
    mine = np.flatnonzero(identity == 0)
    met = set()
    for step in range(60 * sampler.epoch_steps):
        together = [int(photo) for photo in sampler.batch(step) if photo in mine]
        met |= {(a, b) for a in together for b in together if a < b}
    assert len(met) == 28


def test_a_long_tail_takes_no_longer():
    """10,000 people are asked for far steps without walking there."""
    identity = np.repeat(np.arange(10_000), np.random.default_rng(0).geometric(0.4, 10_000))
    sampler = sampling.make_sampler(identity, people=32, photos=4, seed=0)
    assert len(np.unique(identity[sampler.batch(10**12)])) > 32


def test_shares_join_to_the_batch():
    index = np.arange(24)
    np.testing.assert_array_equal(np.concatenate([sampling.share(index, p, 4) for p in range(4)]), index)
    np.testing.assert_array_equal(sampling.share(index, 1, 4), [6, 7, 8, 9, 10, 11])
    with pytest.raises(ValueError, match=r"24 photos does not divide over 5 processes.*multiple of 5"):
        sampling.share(index, 0, 5)
    with pytest.raises(ValueError, match="process is 4 of 4"):
        sampling.share(index, 4, 4)


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ([1] * 50, {}, "nobody of 50 people has two photos"),
        ([100] * 5, {}, "give 20 and singletons 0. Try --batch.people 5"),
        ([2] * 5 + [1] * 50, {}, "give 10 and singletons 3"),
        ([3] * 2, {"people": 2, "photos": 4}, r"Try --batch.photos 3\.$"),
        ([2] * 3, {"photos": 6}, r"Try --batch.people 2 --batch.photos 3\.$"),
        ([9] + [1] * 90, {}, "Add photos of other people"),
        ([4] * 50, {"photos": 1}, "8 × 1"),
        ([4] * 50, {"people": 1}, "1 × 4"),
        ([4] * 50, {"singletons": 1.0}, "singletons is 1.0"),
    ],
)
def test_sets_that_cannot_fill_a_batch_say_so(counts, options, message):
    with pytest.raises(ValueError, match=message):
        sampling.make_sampler(people_of(counts), **({"people": 8, "photos": 4, "seed": 0} | options))


def test_what_is_advised_works():
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        identity = people_of(rng.integers(1, 5, rng.integers(3, 12)))
        wanted = {"people": int(rng.integers(2, 10)), "photos": int(rng.integers(2, 9))}
        try:
            sampling.make_sampler(identity, seed=0, **wanted)
        except ValueError as error:
            advised = dict(re.findall(r"--batch\.(\w+) (\d+)", str(error)))
            if advised:
                refused += 1
                tried = wanted | {name: int(number) for name, number in advised.items()}
                assert tried != wanted
                sampling.make_sampler(identity, seed=0, **tried)
    assert refused > 50


def test_negative_steps_and_float_identities_are_refused():
    sampler = sampling.make_sampler(people_of([4] * 20), people=4, photos=4, seed=0)
    with pytest.raises(ValueError, match="step is -1"):
        sampler.batch(-1)
    with pytest.raises(ValueError, match="float64"):
        sampling.make_sampler(np.zeros(9), people=2, photos=2, seed=0)
    with pytest.raises(ValueError, match="2,147,483,648 photos are more than"):
        sampling.make_sampler(np.broadcast_to(np.int8(0), 2**31), people=2, photos=2, seed=0)  # of one byte

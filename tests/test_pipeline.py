"""Batches from memory and through grain: the same, whatever the step they start from."""

import contextlib
import dataclasses
import threading
import time

import numpy as np
import pytest
from PIL import Image

from faceembed.data import pipeline, sampling, sources
from faceembed.preprocess import Square, crop_square

COUNTS = [1, 2, 3, 5, 4, 4, 1, 6, 2, 2, 3, 7] * 2


@pytest.fixture
def photos():
    identity = np.repeat(np.arange(len(COUNTS), dtype=np.int32), COUNTS)
    images = np.random.default_rng(0).integers(0, 255, (len(identity), 24, 20, 3), np.uint8)
    people = np.array([f"{person:02d}" for person in range(len(COUNTS))])
    return sources.Photos(
        source="made up",
        keys=np.array([f"{people[person]}/{photo}" for photo, person in enumerate(identity)]),
        identity=identity,
        people=people,
        read=lambda index: images[index],
        square=Square(x=9.0, y=13.0, side=16.0),
        problems=(),
        fingerprint="",
    )


@pytest.fixture
def sampler(photos):
    return sampling.make_sampler(photos.identity, people=6, photos=4, seed=2)


def gather(photos, sampler, **options):
    return list(pipeline.batches(photos, sampler, size=16, margin=1.25, **({"steps": 9} | options)))


def assert_equal(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys() == {"image", "identity", "index", "slot"}
        for name in one:
            assert one[name].dtype == other[name].dtype, name
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_a_batch_is_the_plans_photos_cropped(photos, sampler):
    for step, batch in enumerate(gather(photos, sampler)):
        index = sampler.batch(step)
        np.testing.assert_array_equal(batch["index"], index)
        np.testing.assert_array_equal(batch["identity"], photos.identity[index])
        np.testing.assert_array_equal(batch["slot"], np.arange(24))
        crops = [crop_square(photos.read(i), photos.square, 16, 1.25) for i in index]
        np.testing.assert_array_equal(batch["image"], crops)
        assert batch["image"].shape == (24, 20, 20, 3)
        assert [batch[name].dtype for name in ("image", "identity", "index", "slot")] == [np.uint8] + [np.int32] * 3


@pytest.mark.parametrize("processes", [1, 3])
def test_memory_and_grain_agree(photos, sampler, processes):
    for process in range(processes):
        options = {"start_step": 2, "process": process, "processes": processes}
        memory = gather(photos, sampler, **options)
        assert len(memory) == 7
        assert_equal(memory, gather(photos, sampler, memory_limit_bytes=0, **options))


@pytest.mark.parametrize("limit", [0, 1e9])
def test_starting_later_gives_the_rest(photos, sampler, limit):
    whole = gather(photos, sampler, memory_limit_bytes=limit)
    assert_equal(whole[5:], gather(photos, sampler, start_step=5, memory_limit_bytes=limit))
    assert gather(photos, sampler, start_step=9, memory_limit_bytes=limit) == []


@pytest.mark.parametrize("limit", [0, 1e9])
def test_processes_read_their_share_and_nothing_else(photos, sampler, limit):
    whole = gather(photos, sampler)
    parts = [gather(photos, sampler, process=p, processes=4, memory_limit_bytes=limit) for p in range(4)]
    for step, batch in enumerate(whole):
        for name in batch:
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(joined, batch[name], err_msg=name)

    asked = []
    lock = threading.Lock()

    def read(index):
        with lock:
            asked.append(index)
        return photos.read(index)

    watched = sources.dataclasses.replace(photos, read=read)
    mine = gather(watched, sampler, process=1, processes=4, steps=2, memory_limit_bytes=0)
    assert sorted(asked) == sorted(np.concatenate([batch["index"] for batch in mine]).tolist())


def test_the_limit_decides_what_is_read_when(photos, sampler):
    needed = len(photos) * 20 * 20 * 3
    assert pipeline.fits_in_memory(len(photos), 16, 1.25, needed)
    assert not pipeline.fits_in_memory(len(photos), 16, 1.25, needed - 1)
    asked = []
    watched = sources.dataclasses.replace(photos, read=lambda index: asked.append(index) or photos.read(index))
    gather(watched, sampler, steps=9, memory_limit_bytes=needed)
    assert sorted(asked) == list(range(len(photos))), "each photo once, however many steps"
    asked.clear()
    gather(watched, sampler, steps=9, memory_limit_bytes=needed, decoded=pipeline.decode_all(photos, 16, 1.25))
    assert asked == []


def test_a_step_is_planned_once_however_many_threads_ask(photos, sampler):
    planned = []

    class Slow(sampling.Sampler):
        def batch(self, step):
            planned.append(step)
            time.sleep(0.02)
            return super().batch(step)

    slow = Slow(**{field.name: getattr(sampler, field.name) for field in dataclasses.fields(sampler) if field.init})
    assert len(gather(photos, slow, memory_limit_bytes=0)) == 9
    assert sorted(planned) == list(range(9))


def test_a_framing_is_cut_by_each_photos_own_width(tmp_path):
    (tmp_path / "anna").mkdir()
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (*size, 3), np.uint8) for size in ((109, 89), (218, 178), (40, 89))]
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "anna" / f"{number}.png")
    photos = sources.open_source(f"folder:{tmp_path}", data_dir=tmp_path / "cache")
    crops = pipeline.decode_all(sources.framed(photos, "celeba"), 32)
    # The last photo ends above the square's lower edge.
    for crop, image, factor in zip(crops, images, (1, 2, 1), strict=True):
        square = Square(x=44.5 * factor, y=62.0 * factor, side=64.0 * factor)
        np.testing.assert_array_equal(crop, crop_square(image, square, 32))
    assert np.any(crops != pipeline.decode_all(photos, 32))


def test_photos_that_do_not_decode_are_all_named(photos, sampler):
    def read(index):
        if index in (3, 40):
            raise ValueError("cut off")
        return photos.read(index)

    broken = sources.dataclasses.replace(photos, read=read)
    three, forty = photos.keys[3], photos.keys[40]
    with pytest.raises(ValueError, match=rf"(?s)2 of {len(photos)} photos.*{three}: cut off.*{forty}: cut off"):
        pipeline.decode_all(broken, 16)
    with pytest.raises(ValueError, match=rf"({three}|{forty}): cut off"):
        gather(broken, sampler, steps=30, memory_limit_bytes=0)


# ---- photos that do not decode are replaced -----------------------------------------------------------------------------


def broken(photos, *indices):
    def read(index):
        if index in indices:
            raise ValueError("cut off")
        return photos.read(index)

    return dataclasses.replace(photos, read=read)


def test_who_stands_in_follows_from_the_photo_alone(photos):
    # People 4 to 6 have the photos 11-14, 15-18 and 19.
    stand_ins = pipeline.StandIns(photos, limit=9)
    assert list(stand_ins.of(13))[:6] == [13, 14, 11, 12, 15, 16]
    stand_ins.failed({13: "13: cut off", 14: "14: cut off"}, step=3)
    assert list(stand_ins.of(13))[:3] == [11, 12, 15]
    assert list(stand_ins.of(19))[:2] == [19, 20], "the next person for one who has no other"
    assert sorted(stand_ins.of(79)) == [i for i in range(80) if i not in (13, 14)]
    np.testing.assert_array_equal(stand_ins.shown(np.array([12, 13, 14, 79], np.int32)), [12, 11, 11, 79])


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("limit", [0, 1e9])
def test_the_sequence_with_stand_ins_is_the_same_everywhere(photos, sampler, limit, processes):
    """Whether read as used or from memory, by one process or several, from the start or after an interruption."""
    alone = int(np.flatnonzero(photos.identity == 0)[0])  # a singleton
    bad = (alone, 13, 14, 40)
    expected = []
    for step in range(9):
        index = np.array([{13: 11, 14: 11, alone: alone + 1}.get(i, i) for i in sampler.batch(step)])
        index[index == 40] = next(i for i in pipeline.StandIns(photos).of(40) if i != 40)
        expected.append(index)
    met = {i for step in range(9) for i in sampler.batch(step).tolist()} & set(bad)
    assert len(met) >= 3, "the plan must meet them"
    for start in (0, 5):
        parts = []
        for process in range(processes):
            stand_ins = pipeline.StandIns(photos, limit=4)
            options = {"process": process, "processes": processes, "start_step": start, "memory_limit_bytes": limit}
            parts.append(gather(broken(photos, *bad), sampler, stand_ins=stand_ins, **options))
        for step, shown in enumerate(zip(*parts, strict=True), start=start):
            index = np.concatenate([part["index"] for part in shown])
            np.testing.assert_array_equal(index, expected[step])
            np.testing.assert_array_equal(np.concatenate([part["identity"] for part in shown]), photos.identity[index])
            crops = [crop_square(photos.read(i), photos.square, 16, 1.25) for i in index]
            np.testing.assert_array_equal(np.concatenate([part["image"] for part in shown]), crops)
            assert shown[0]["index"].dtype == shown[0]["identity"].dtype == np.int32


def test_bad_photos_are_told_once_with_the_first_batch_that_needed_them(photos, sampler):
    first = {i: next(step for step in range(30) if i in sampler.batch(step)) for i in (13, 40)}
    stand_ins = pipeline.StandIns(photos, limit=2)
    gather(broken(photos, 13, 40), sampler, steps=30, memory_limit_bytes=0, stand_ins=stand_ins)
    early = min(first.values())
    assert stand_ins.news(early) == [], "read ahead, and not needed yet"
    assert stand_ins.keys(early) == []
    told = stand_ins.news(30)
    assert sorted(told) == sorted((first[i], f"{photos.keys[i]}: cut off") for i in (13, 40))
    assert stand_ins.news(30) == []
    assert stand_ins.keys(30) == [photos.keys[13], photos.keys[40]]
    # A command that goes on does not ask for them again, nor tell of them again; they count.
    asked = []
    watched = dataclasses.replace(photos, read=lambda index: asked.append(index) or photos.read(index))
    for limit in (1, 2):  # what another process has found counts as one's own
        other = pipeline.StandIns(photos, limit=limit)
        with pytest.raises(ValueError, match="do not decode") if limit == 1 else contextlib.nullcontext():
            for at, index, why in stand_ins.found(30):
                other.failed({index: why}, at)
            assert other.keys(30) == stand_ins.keys(30)
            assert other.news(30) == told
    known = pipeline.StandIns(photos, limit=2, known=stand_ins.keys(30))
    again = gather(watched, sampler, steps=30, memory_limit_bytes=0, stand_ins=known)
    assert not {13, 40} & set(asked)
    assert not {13, 40} & set(np.concatenate([batch["index"] for batch in again]).tolist())
    assert known.news(30) == []
    with pytest.raises(
        ValueError, match=r"(?s)3 of 80 photos of made up do not decode, more than --skip-bad-photos 2:"
    ):
        gather(broken(photos, 3), sampler, steps=30, stand_ins=known)


def test_a_flipped_byte_in_a_prepared_set_is_one_photo_that_does_not_decode(tmp_path):
    """array_record has checksums: reading that record raises, and the others read as before."""
    import io
    import zipfile

    from faceembed.data import builders

    draw = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for number in range(1, 41):
            data = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (109, 89, 3), np.uint8)).save(data, "JPEG", quality=90)
            archive.writestr(f"img_align_celeba/{number:06d}.jpg", data.getvalue())
    lines = "".join(f"{number:06d}.jpg {1 + (number - 1) // 4}\n" for number in range(1, 41))
    (tmp_path / "identity.txt").write_text(lines)
    builders.prepare(
        "celeba", archives=[tmp_path / "faces.zip"], identities=tmp_path / "identity.txt", data_dir=tmp_path / "data"
    )
    whole = sources.open_source("celeba", data_dir=tmp_path / "data")
    pixels = [whole.read(index) for index in range(40)]
    shard = next((tmp_path / "data" / "celeba").rglob("*.array_record*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    damaged = sources.open_source("celeba", data_dir=tmp_path / "data")
    assert damaged.fingerprint == whole.fingerprint, "nothing tells before it is read"

    errors = {}
    for index in range(40):
        try:
            np.testing.assert_array_equal(damaged.read(index), pixels[index])
        except ValueError as error:
            errors[index] = str(error)
    ((bad, message),) = errors.items()
    assert f"photo {damaged.keys[bad]} does not decode" in message
    sampler = sampling.make_sampler(damaged.identity, people=4, photos=2, seed=0)
    shown = []
    for limit in (0, 1e9):
        stand_ins = pipeline.StandIns(damaged, limit=1)
        batches = pipeline.batches(
            damaged, sampler, size=16, steps=20, memory_limit_bytes=limit, stand_ins=stand_ins, progress=False
        )
        shown.append([batch["index"].tolist() for batch in batches])
        assert stand_ins.keys(20) == [damaged.keys[bad]]
    assert shown[0] == shown[1]
    planned = [sampler.batch(step).tolist() for step in range(20)]
    assert any(bad in batch for batch in planned)
    assert not any(bad in batch for batch in shown[0])


def test_what_does_not_belong_together_is_refused(photos, sampler):
    fewer = sources.select(photos, np.arange(len(photos)) > 0)
    with pytest.raises(ValueError, match="plan is for 80 photos, but the source has 79"):
        gather(fewer, sampler)
    with pytest.raises(ValueError, match=r"expected \(80, 20, 20, 3\)"):
        gather(photos, sampler, decoded=pipeline.decode_all(photos, 16))


def test_only_photos_of_the_pairs_that_choose_the_best_checkpoint_are_decoded():
    """A twentieth of ten million photos neither takes minutes to decode nor fills the memory."""
    from faceembed import metrics
    from faceembed.data import pairs, splits
    from faceembed.preprocess import Preprocess
    from faceembed.training import loop

    names = np.array([f"{person:04d}" for person in range(2000)])
    names = names[splits.split_of(names) == "select"][:60]
    identity = np.repeat(np.arange(60, dtype=np.int32), 40)
    read: list[int] = []
    images = np.random.default_rng(0).integers(0, 255, (len(identity), 16, 16, 3), np.uint8)
    photos = sources.Photos(
        source="made up", keys=np.array([f"{names[who]}/{i % 40:02d}" for i, who in enumerate(identity)]),
        identity=identity, people=names, read=lambda index: (read.append(index), images[index])[1], square=None,
        problems=(), fingerprint="",
    )  # fmt: skip
    select = loop._Select.read(photos, Preprocess(size=16), progress=False)
    chosen = pairs.heldout(photos, "select")
    first, second = pairs.resolve(chosen, photos)
    assert sorted(read) == np.unique([first, second]).tolist()
    assert len(read) < len(photos)
    vectors = images.reshape(len(images), -1)[:, :8] / 255.0
    expected = metrics.auc(-((vectors[first] - vectors[second]) ** 2).sum(1), chosen.same)
    found = select.auc(lambda _, shown: shown.reshape(len(shown), -1)[:, :8] / 255.0, None)
    assert found == pytest.approx(expected)

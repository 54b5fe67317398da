"""The benchmarks' own arithmetic and fairness: turns, ratios, threads, memory, equal triplets. Nothing is timed here."""

import concurrent.futures
import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from experiments.benchmarks import __main__ as runner
from experiments.benchmarks import growth, harness, loss, margin_softmax, microbatches, reading, records, tiled
from experiments.benchmarks import sampling as planning
from experiments.benchmarks import search as searching
from faceembed import encoders
from faceembed import tiled as slabs
from faceembed.data import pipeline, sampling, sources

ROOT = Path(__file__).parents[1]


class FakeClock:
    """Time passes only in calls, and every call is noted."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def call(self, name, *seconds):
        lasts = iter(seconds)

        def run():
            self.log.append(name)
            self.now += next(lasts)

        return run

    def rest(self, seconds):
        self.log.append("rest")
        self.now += seconds


def test_contestants_alternate_in_both_orders_and_only_the_turns_after_their_first_calls_count():
    clock = FakeClock()
    contestants = {"a": clock.call("a", 9, 1, 7, 2, 7, 3, 7, 4), "b": clock.call("b", 8, 1, 5, 10, 5, 20, 5, 30)}
    times = harness.interleave(contestants, repeats=3, clock=lambda: clock.now, rest=clock.rest)
    assert "".join(name[0] for name in clock.log) == "aabb" + "raarbb" + "rbbraa" + "raarbb"
    assert times == {"a": pytest.approx([2, 3, 4]), "b": pytest.approx([10, 20, 30])}


def test_a_quick_call_is_made_until_its_turn_is_long_enough():
    clock = FakeClock()
    each = harness.TURN / 3.5  # so that four calls fill a turn
    call = clock.call("a", 1, each, *(2 * [9, each, 2 * each, each, 4 * each]))
    times = harness.interleave({"a": call}, repeats=2, clock=lambda: clock.now, rest=clock.rest)
    assert times["a"] == pytest.approx([2 * each] * 2)
    with pytest.raises(ValueError, match="repeats is 0"):
        harness.interleave({}, repeats=0)


def test_ratios_are_of_the_same_round():
    times = {"faceembed": [1.0, 2.0, 4.0], "peer": [10.0, 40.0, 20.0]}
    assert harness.ratio(times, "peer", "faceembed") == pytest.approx((6.0, 10.0, 18.0))
    row = harness.versus(times, "peer")
    assert row == pytest.approx({"faceembed ms": 2000, "peer ms": 20000, "ratio": 10, "q10": 6, "q90": 18})
    rates = harness.versus(times, "peer", images=40)
    assert rates == pytest.approx({"faceembed img/s": 20, "peer img/s": 2, "ratio": 10, "q10": 6, "q90": 18})
    alone = harness.versus({"faceembed": [2.0]}, "peer")
    assert alone == {"faceembed ms": 2000, "peer ms": None, "ratio": None, "q10": None, "q90": None}


@pytest.mark.skipif(
    not hasattr(harness.os, "sched_setaffinity"), reason="this system cannot keep a process on some CPUs"
)
def test_a_fresh_process_is_confined_and_this_one_is_not():
    before = harness.processors()
    assert harness.fresh(harness.threads, cpus=1) == {"XLA": 1}
    assert harness.processors() == before
    with pytest.raises(ValueError, match=f"--threads is {before + 1}, and this process may use {before} CPUs"):
        harness.confine(before + 1)


def holds(megabytes):
    """A call that has them all at once, in a thread of its own, whose freed memory the C library would keep."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    np.ones(200_000_000, np.uint8).sum()  # an earlier high-water mark is not the call's
    return lambda: pool.submit(lambda: len([np.ones(1_000_000, np.uint8) for _ in range(megabytes)])).result()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets the high-water mark")
def test_peak_memory_is_that_of_one_call():
    assert 59e6 < harness.peak_bytes(holds, 60) < 65e6
    assert harness.peak_bytes(holds, 0) < 5e6


def test_what_others_use_is_all_that_is_busy_less_our_own(monkeypatch, tmp_path):
    ticks = harness.os.sysconf("SC_CLK_TCK")
    stat = tmp_path / "stat"  # user nice system idle iowait irq softirq steal guest guest_nice
    stat.write_text(f"cpu  {' '.join(str(n * ticks) for n in (50, 2, 10, 1000, 300, 1, 1, 6, 50, 0))}\ncpu0 1 2 3\n")
    monkeypatch.setattr(harness, "Path", lambda path: {"/proc/stat": stat}[path])
    monkeypatch.setattr(harness.os, "times", lambda: (5.0, 1.0, 20.0, 4.0, 12345.0))
    assert harness.others_seconds() == pytest.approx(70 - 30)
    stat.unlink()
    assert np.isnan(harness.others_seconds())


BENCHMARK = '''
"""A bar of 7."""
from experiments.benchmarks import harness
def run(*, quick=False):
    return [{"table": "first", "n": 3, "quick": quick}, {"table": "second", "miner": "all", "ratio": None}]
if __name__ == "__main__":
    harness.main(run)
'''


def test_the_command_prints_tables_writes_json_and_survives_a_failure(tmp_path, monkeypatch, capfd):
    package = tmp_path / "measured"
    package.mkdir()
    (package / "good.py").write_text(BENCHMARK)
    (package / "bad.py").write_text("raise RuntimeError('out of order')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    results = runner.run_all(["bad", "good"], ["--quick", "--threads", "1"], package="measured")
    printed, errors = capfd.readouterr()
    assert results["bad"] == {"error": 1}
    assert "out of order" in errors
    good = results["good"]
    assert good["rows"] == [
        {"table": "first", "n": 3, "quick": True}, {"table": "second", "miner": "all", "ratio": None},
    ]  # fmt: skip
    assert good["notes"] == "A bar of 7."
    assert good["machine"]["cpus"] == 1
    assert "first\nn  quick" in printed
    assert "second\nminer  ratio" in printed
    assert "CPUs busy" in printed

    monkeypatch.setattr(runner, "run_all", lambda names, options: {name: {"asked": options} for name in names})
    assert runner.main(["loss", "--quick", "--threads", "1", "--json", str(tmp_path / "all.json")]) == 0
    written = json.loads((tmp_path / "all.json").read_text())
    assert written == {"loss": {"asked": ["--device", "cpu", "--quick", "--threads", "1"]}}
    monkeypatch.setattr(runner, "run_all", lambda names, options: {name: {"error": 1} for name in names})
    assert runner.main([]) == 1


def test_help_names_every_benchmark_and_a_typing_error_is_told():
    command = [sys.executable, "-m", "experiments.benchmarks"]
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = {file.stem for file in (ROOT / "experiments" / "benchmarks").glob("*.py")}
    for name in runner.BENCHMARKS:
        assert name in done.stdout
        assert name in files
    done = subprocess.run([*command, "lose"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no benchmark is called 'lose'" in done.stderr


def test_a_peer_that_is_missing_is_told_in_one_line_and_we_are_measured_alone(monkeypatch, capsys):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(harness, "fresh", lambda function, *args, cpus: function(*args))
    monkeypatch.setattr(harness, "peak_bytes", lambda make, *case, cpus, in_torch: 7_000_000)
    monkeypatch.setattr(loss, "SIZES", {"all": (64,)})
    monkeypatch.setattr(loss, "PRODUCT_BARS", {})
    (row,) = loss.run(quick=True)
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert "pip install torch pytorch-metric-learning" in told
    assert row["faceembed ms"] > 0
    assert row["PML ms"] is row["ratio"] is row["PML MB"] is None
    assert row["faceembed MB"] == 7


def test_both_sides_have_the_same_triplets():
    pytest.importorskip("torch", reason="pip install torch")
    pytest.importorskip("pytorch_metric_learning", reason="pip install pytorch-metric-learning")
    mine = {miner: loss.ours(miner, 48)() for miner in loss.SIZES}
    theirs = {miner: loss.peers(miner, 48)() for miner in loss.SIZES}
    for miner in mine:
        loss.check_equal(mine[miner], theirs[miner])
        for other in theirs.keys() - {miner}:
            with pytest.raises(AssertionError, match="loss is off by"):
                loss.check_equal(mine[miner], theirs[other])
    value, gradient = mine["all"]
    with pytest.raises(AssertionError, match="gradient is off by"):
        loss.check_equal((value, 1.001 * gradient), theirs["all"])


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """(Photos, the peer's dataset) of the same 8 files."""
    folder = tmp_path_factory.mktemp("faces")
    rng = np.random.default_rng(0)
    for name in ("a/0", "a/1", "b/0", "b/1", "c/0", "c/1", "d/0", "d/1"):
        (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (20, 16, 3), np.uint8))
        coarse.resize((reading.WIDTH, reading.HEIGHT), Image.Resampling.BICUBIC).save(folder / "set" / f"{name}.jpg")
    opened = sources.open_source(f"folder:{folder}/set", data_dir=folder / "data", progress=False)
    photos = sources.framed(opened, "celeba")
    return photos, reading.Faces([folder / "set" / f"{key}.jpg" for key in photos.keys], photos.identity)


def test_both_readers_cut_the_same_square(faces):
    photos, dataset = faces
    sampler = sampling.make_sampler(photos.identity, people=4, photos=2, seed=0)
    size = {"size": reading.SIZE, "margin": reading.MARGIN}
    batch = next(pipeline.batches(photos, sampler, steps=1, memory_limit_bytes=0, **size))
    for image, index in zip(batch["image"], batch["index"], strict=True):
        np.testing.assert_array_equal(image, np.asarray(dataset.crop(int(index))))


def test_the_peer_that_draws_nothing_sees_the_middle_of_the_square(faces):
    square = faces[1].crop(0)
    room = (square.width - reading.SIZE) // 2
    middle = np.asarray(square)[room:-room, room:-room]
    warp = reading.Faces._warp
    np.testing.assert_array_equal(np.asarray(warp([0.5] * 5, square)), middle)
    np.testing.assert_array_equal(np.asarray(warp([0.5] * 4 + [0.1], square)), middle[:, ::-1])
    np.testing.assert_allclose(np.asarray(reading.Faces._colour([0.5] * 7, square)), np.asarray(square), atol=1)


def test_records_are_opened_and_read_from_both_forms(tmp_path):
    records.write_sparse(tmp_path / "sparse.rec", 300, 5)
    row = records.opening(tmp_path / "sparse.rec", tmp_path / "data")
    assert (row["photos"], row["people"], row["keys GB"]) == (1500, 300, 1500 * 64 / 1e9)
    assert not (tmp_path / "data").exists(), "the ranges were used: nothing was scanned and remembered"

    faces = [np.full((112, 112, 3), level, np.uint8) for level in range(256)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records.synthetic, "render_all", lambda *_: np.stack(faces))
        records.write_faces(tmp_path / "faces.rec", 6, 4)
    rows = records.reading(tmp_path / "faces.rec", tmp_path / "data", 1, 8)
    assert [(row["photos"], row["threads"] > 1) for row in rows] == [
        ("encoded", False), ("encoded", True), ("decoded", False), ("decoded", True),
    ]  # fmt: skip
    assert min(row["faceembed img/s"] for row in rows) > 0


def test_mining_in_slabs_is_timed_beside_the_product_of_all_pairs(monkeypatch):
    swept, semi_hard = [], slabs.semi_hard
    monkeypatch.setattr(slabs, "semi_hard", lambda *given, **more: swept.append(1) or semi_hard(*given, **more))
    emb, ids = tiled.embeddings(96, 4)
    row = tiled.beside_product("semi_hard", 96, 4, 1)
    assert swept, "so few photos would be a table"
    assert row["bar"] == 8
    assert row["multiple"] > 0
    np.testing.assert_allclose(tiled.product(96, 4)(), emb @ emb[32:].T, atol=1e-5)  # the last slab reaches back
    assert sorted(np.bincount(ids)) == [4] * 24


def test_growth_measures_updates_of_the_training(monkeypatch):
    tiny = encoders.make_encoder("convnet", widths=(4, 8), blocks=(1, 1), dim=8)
    monkeypatch.setattr(growth.embed, "build_encoder", lambda experiment: tiny)
    call = growth.make(8, 16, 2)
    losses = [float(call()) for _ in range(3)]
    assert np.isfinite(losses).all()
    assert len(set(losses)) == 3
    monkeypatch.setattr(harness, "fresh", lambda function, *full: harness.Spread(1.0, 10.0 * full[0], 99.0))
    monkeypatch.setattr(harness, "peak_bytes", lambda make, *full: 5_000_000)
    rows = growth.run(quick=True)
    assert [row["table"] for row in rows[::2]] == ["growth with batch", "growth with image size", "growth with devices"]
    assert [row["step"] for row in rows] == [1, 2, 1, 1, 1, 1]
    assert {row["photo"] for row in rows} == {1}
    assert {row["MB"] for row in rows} == {5}
    assert jax.device_count() == 8


def test_microbatches_are_held_against_the_undivided_batch(monkeypatch):
    tiny = encoders.make_encoder("convnet", widths=(4, 8), blocks=(1, 1), dim=8)
    monkeypatch.setattr(growth.embed, "build_encoder", lambda experiment: tiny)
    made = []

    def make(*full, make=growth.make):
        made.append(full)
        return make(*full)

    monkeypatch.setattr(growth, "make_alone", make)
    monkeypatch.setattr(harness, "fresh", lambda function, *args: function(*args))
    monkeypatch.setattr(harness, "peak_bytes", lambda make, *full: 8_000_000 // full[-1])
    monkeypatch.setattr(microbatches, "SIZE", 32)
    rows = microbatches.run(quick=True)
    assert made == [(16, 16, 1, 1), (16, 16, 1, 2)]
    assert [(row["N"], row["photos at once"], row["MB"], row["of N=1"]) for row in rows] == [
        (1, 16, 8, 1),
        (2, 8, 4, 0.5),
    ]
    assert rows[0]["time"] == 1 != rows[1]["time"] > 0
    assert rows[1]["bar"] == pytest.approx(4 / 3)


def test_probes_are_mates_and_strangers_by_turns_and_the_truth_is_who_is_nearest(monkeypatch):
    monkeypatch.setattr(searching, "CHUNK", 7)
    vectors = searching.people(50)
    probes = searching.probes_of(vectors)
    np.testing.assert_allclose(np.linalg.norm(probes, axis=1), 1, rtol=1e-5)
    distance = np.sum((probes[:, None].astype(np.float64) - vectors) ** 2, 2)
    np.testing.assert_array_equal(searching.truth(vectors, probes), distance.argmin(1))
    # Two unit vectors at right angles, one of them of length 0.8: 2 - 2 / sqrt(1.64) from the first.
    assert np.median(distance.min(1)[::2]) == pytest.approx(0.44, abs=0.1)
    assert np.median(distance.min(1)[1::2]) > 1


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("name", searching.CONTESTANTS)
def test_every_contestant_names_the_nearest_from_what_it_stored(tmp_path, name):
    contestant = searching.CONTESTANTS[name]
    for module in contestant.modules:
        pytest.importorskip(module, reason=f"pip install {module.replace('_', '-')}")
    vectors = searching.people(300)
    probes = searching.probes_of(vectors)[: searching.BATCH]
    (tmp_path / "gallery").mkdir(mode=0o700)
    contestant.write(tmp_path / "gallery", vectors)
    with contextlib.ExitStack() as stack:
        find = contestant.open(tmp_path / "gallery", stack)
        named, five = find(probes, 1), find(probes[:1], 5)
        assert named.shape == (searching.BATCH, 1)
        assert five.shape == (1, 5)
        right = named[:, 0] == searching.truth(vectors, probes)
    assert right.all() or ("IVF" in name and right[::2].mean() > 0.5)


def test_searches_are_measured_without_the_peers_that_are_missing_or_cannot_hold_so_many(monkeypatch):
    monkeypatch.setattr(harness, "available", lambda *modules: not modules)
    monkeypatch.setattr(harness, "fresh", lambda function, *args: function(*args))
    ours = searching.CONTESTANTS[searching.OURS]
    small = dataclasses.replace(ours, most=499)
    monkeypatch.setattr(searching, "CONTESTANTS", {searching.OURS: ours, "small": small})
    row, left_out, *bars = searching.run(quick=True)
    assert row["table"] == "500 people"
    assert row["recall mates"] == row["recall strangers"] == 1
    assert min(row["q/s of 1"], row["q/s of 64"], row["stored s"], row["loaded s"]) > 0
    assert row["×1"] is row["×64"] is None
    assert left_out == {"table": "500 people", "contestant": "small: left out"}
    assert [(bar["probes"], bar["k"]) for bar in bars] == [(1, 1), (64, 1), (1, 5), (64, 5)]
    assert bars[0]["faceembed.search ms"] > 0
    assert bars[0]["faiss flat ms"] is bars[0]["ratio"] is None


def test_simulated_people_have_a_long_tail_and_are_planned_and_split(monkeypatch):
    count = np.bincount(planning.who(20_000, 2000))
    assert (count.sum(), len(count), count.min(), count.max()) == (20_000, 2000, 1, 453)
    assert 0.05 < np.mean(count == 1) < 0.15
    assert abs(np.corrcoef(count[:-1], count[1:])[0, 1]) < 0.1, "in no order"
    monkeypatch.setattr(harness, "fresh", lambda function, *args: function(*args))
    monkeypatch.setattr(harness, "peak_bytes", lambda make, *args: (make(*args)(), 5_000_000)[1])
    plan, *way = planning.run(quick=True)
    assert (plan["table"], plan["batches an epoch"], plan["MB"]) == ("the plan", 99, 5)
    assert min(plan["start s"], plan["batch ms"], plan["epoch ms"]) > 0
    assert {row["table"] for row in way} == {"on the way, 20,000 photos of 2,000 people"}
    assert [row["step"] for row in way][2:5] == ["1,000 photos named to leave out", "and left out", "plan"]
    assert min(row["s"] for row in way) > 0
    # 12 digits, two quotes, a comma and a space for each of 85 % of the people.
    assert way[-1]["file MB"] == pytest.approx(0.85 * 2000 * 16 / 1e6, rel=0.03)


@pytest.mark.slow
def test_class_weights_are_divided_over_devices_and_held_against_all_rows_on_each(monkeypatch):
    monkeypatch.setattr(harness, "fresh", lambda function, *args: function(*args))
    monkeypatch.setattr(margin_softmax, "start", lambda devices: None)
    monkeypatch.setattr(margin_softmax, "DEVICES", 2)
    # Augmentation is most of what would be compiled.
    plain = lambda step, slot, images: images[:, 1:-1, 1:-1] / 127.5 - 1.0  # noqa: E731
    monkeypatch.setattr(margin_softmax.loop, "make_views", lambda _: plain)
    whole, sampled, all_of_them, some, beside = margin_softmax.run(quick=True)
    assert whole["compared"] == 3000
    assert sampled["compared"] < 1000
    assert some["temporary MB"] < all_of_them["temporary MB"]
    assert beside["plain state MB"] == 2 * beside["state MB"]  # that both compute the same is asserted there

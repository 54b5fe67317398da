"""Nothing spoils a run: each promise of docs/reliability.md, with real processes, signals and file systems.

The interruptions are those of `experiments.chaos`, whose tiny run they share; `-s` shows its transcript.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import chaos
from faceembed import checkpoint, config
from faceembed import mesh as meshes
from faceembed.data import splits
from faceembed.training import interrupts, loop
from tests.conftest import save_photos

STEPS = 60


@dataclasses.dataclass
class Lab:
    """A folder with an uninterrupted run and compiled programs."""

    folder: Path
    whole: Path
    seconds: float

    def start(self, run, *more, name="log", prefix=()):
        """The same command on another directory: (process, the file that it prints to)."""
        log = self.folder / f"{run.parents[1].name}-{run.parent.name}-{name}.txt"  # not on a disk that gets full
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [*prefix, *chaos.command(run, STEPS, *more)], cwd=chaos.ROOT, stdout=file, stderr=subprocess.STDOUT,
                env=chaos.environment(self.folder / "xla"),
            )  # fmt: skip
        return process, log

    def finish(self, run, *more, status=0, name="log", prefix=()):
        """Gives the command and returns what it printed."""
        process, log = self.start(run, *more, name=name, prefix=prefix)
        return ended(process, log, status)


def ended(process, log, status=0):
    try:
        process.wait(timeout=300)
    finally:
        process.kill()
    assert process.returncode == status, log.read_text()
    return log.read_text()


def wait_until(process, log, true, what):
    """Asks again and again; fails at once if the process ends before."""
    deadline = time.monotonic() + 240
    while not true():
        assert process.poll() is None, f"ended before {what}:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"no {what}:\n{log.read_text()}"
        time.sleep(0.001)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, faces):
    folder = tmp_path_factory.mktemp("chaos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chaos, "DATA", faces)
        patch.setattr(chaos, "XLA", os.environ["FACEEMBED_TEST_XLA"])
        yield Lab(folder, *chaos.uninterrupted(folder, STEPS))


def differences(lab, run):
    return list(chaos.differences(lab.whole, run, STEPS))


# ---- kill -9 -----------------------------------------------------------------------------------------------------------


def attacked(folder, whole, seconds, kills, steps, seed):
    told = ["", f"{kills} kills, seed {seed}"]
    run = folder / "killed"
    done = chaos.attack(run, folder, kills=kills, steps=steps, seed=seed, seconds=seconds, tell=told.append)
    wrong = list(chaos.differences(whole, run, steps))
    print(*told, f"verdict: {wrong or 'bit for bit the uninterrupted run'}", sep="\n")
    assert len(done) == kills
    assert wrong == []
    # Every start after a kill says of whom it takes over, unless it was killed itself before it came to that.
    logs = [(folder / f"start-{number:02d}.txt").read_text() for number in range(1, kills + 1)]
    assert "was killed or its machine stopped" in logs[-1]
    return done


def test_killed_at_random_moments_a_run_ends_as_if_nothing_had_happened(lab):
    done = attacked(lab.folder, lab.whole, lab.seconds, kills=3, steps=STEPS, seed=3)
    assert sum(kill.in_save for kill in done) >= 1


@pytest.mark.slow
def test_killed_twenty_times_in_a_row_a_run_ends_as_if_nothing_had_happened(tmp_path):
    whole, seconds = chaos.uninterrupted(tmp_path, 300)
    done = attacked(tmp_path, whole, seconds, kills=20, steps=300, seed=0)
    assert sum(kill.in_save for kill in done) >= 5
    assert {kill.aim for kill in done} == {"start", "save", "training", "report"}


# ---- signals -----------------------------------------------------------------------------------------------------------


def interrupted(lab, run, number, row=13):
    process, log = lab.start(run)
    wait_until(process, log, lambda: chaos.last_logged(run) >= row, f"row {row}")
    process.send_signal(number)
    return ended(process, log, status=130 if number == signal.SIGINT else 0)


def check_stopped(lab, run, printed, name):
    step = chaos.saved(run)[-1]
    assert f"stopped by {name} at step {step}; saved; the same command goes on" in printed
    assert step < STEPS, "the signal came too late to mean anything"
    assert not (run / "results.json").exists()
    assert chaos.half_written(run) == []
    assert "Traceback" not in printed
    return step


def test_sigterm_saves_and_the_same_command_goes_on(lab, tmp_path):
    run = tmp_path / "run"
    step = check_stopped(lab, run, interrupted(lab, run, signal.SIGTERM), "SIGTERM")
    again = lab.finish(run, name="again")
    assert f"going on from step {step} of {STEPS}" in again
    assert "was killed" not in again, "it ended by itself"
    assert differences(lab, run) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1"])
def test_ctrl_c_and_slurms_signal_save_too(lab, tmp_path, name):
    run = tmp_path / "run"
    check_stopped(lab, run, interrupted(lab, run, getattr(signal, name)), name)
    lab.finish(run, name="again")
    assert differences(lab, run) == []


def test_a_second_ctrl_c_stops_at_once(capfd):
    with interrupts.Interrupts() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.should_stop(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "Ctrl-C again stops at once" in capfd.readouterr().err


def test_handlers_are_there_only_while_they_are_needed():
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    with interrupts.Interrupts() as stop:
        assert not stop.should_stop(1)
        assert all(signal.getsignal(number) != handler for number, handler in before.items())
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.should_stop(2)
        assert "stopped by SIGUSR1 at step 2" in str(stop.stopped(2))
        assert (stop.stopped(2).status, interrupts.Interrupts().should_stop(3)) == (0, False)
    assert {number: signal.getsignal(number) for number in interrupts.SIGNALS} == before


# ---- a full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with room for a few checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system of a few MB can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk):
    """Until not one more byte goes onto it."""
    with open(disk / "ballast", "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 8, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return disk / "ballast"


def held(process, act):
    """Does something while a process stands still."""
    process.send_signal(signal.SIGSTOP)
    try:
        return act()
    finally:
        process.send_signal(signal.SIGCONT)


def filled_up(lab, run, disk):
    """A run whose disk is full from the save of step 12 on: (process, log, ballast)."""
    process, log = lab.start(run)
    wait_until(process, log, lambda: 12 in chaos.saved(run), "step 12")
    return process, log, held(process, lambda: fill(disk))


def check_told(printed, run):
    assert f"could not be saved in {run / 'checkpoints'}: No space left on device (0.0 MB are free there, " in printed
    assert "The training goes on, and tries again at the next save." in printed
    assert f"{run / 'metrics.jsonl'} cannot be written (No space left on device" in printed
    assert "Traceback" not in printed


def test_a_disk_that_stays_full_ends_the_run_with_an_error_and_spoils_nothing(lab, small_disk, tmp_path):
    run = small_disk / "run"
    process, log, ballast = filled_up(lab, run, small_disk)
    printed = ended(process, log, status=1)
    check_told(printed, run)
    newest = chaos.saved(run)[-1]
    assert 12 <= newest < STEPS
    assert f"error: the checkpoint of step {STEPS} could not be saved" in printed
    assert f"step {newest} is the last one saved" in printed
    assert not (run / "results.json").exists()
    for step in chaos.saved(run):
        assert checkpoint.damage(run / "checkpoints" / str(step)) is None
    ballast.unlink()
    again = lab.finish(run, name="again")
    assert f"going on from step {newest} of {STEPS}" in again
    assert [wrong for wrong in differences(lab, run) if not wrong.startswith("events")] == []


@pytest.mark.slow
def test_when_there_is_room_again_the_run_saves_and_ends_well(lab, small_disk, tmp_path):
    run = small_disk / "run"
    process, log, ballast = filled_up(lab, run, small_disk)
    told = f"{run / 'metrics.jsonl'} cannot be written"  # some time after the save: its last block had room
    wait_until(process, log, lambda: told in log.read_text(), "failed row")
    held(process, ballast.unlink)
    printed = ended(process, log)
    check_told(printed, run)
    assert f"{run / 'metrics.jsonl'} is written again; nothing is missing in it." in printed
    assert [wrong for wrong in differences(lab, run) if not wrong.startswith("events")] == []
    kinds = {json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()}
    assert "not saved" in kinds


@pytest.mark.slow
def test_a_file_that_may_not_grow_is_told_like_a_full_disk(lab, tmp_path):
    """RLIMIT_FSIZE, where nothing can be mounted: the arrays of a save do not fit, the log does."""
    run = tmp_path / "run"

    printed = lab.finish(run, status=1, prefix=("bash", "-c", 'ulimit -f 20; exec "$@"', "bash"))  # kB
    assert "could not be saved" in printed
    assert "File too large" in printed
    assert "there is no other" in printed
    assert chaos.saved(run) == []
    again = lab.finish(run, name="again")
    assert "going on" not in again
    assert [wrong for wrong in differences(lab, run) if not wrong.startswith("events")] == []


# ---- a damaged checkpoint ----------------------------------------------------------------------------------------------


def test_a_truncated_newest_checkpoint_is_told_kept_and_passed_over(lab, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(lab.whole, run)
    for gone in ("results.json", "report.html", "policy.json"):
        (run / gone).unlink()
    step = run / "checkpoints" / str(STEPS)
    largest = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    printed = lab.finish(run)
    assert f"the checkpoint of step {STEPS} is damaged: {largest.relative_to(step)} (" in printed
    assert f"bytes) is not what was saved. It is left out, and kept as {run / 'damaged' / str(STEPS)}." in printed
    assert f"going on from step {STEPS - chaos.EVERY} of {STEPS}" in printed
    assert (run / "damaged" / str(STEPS) / largest.relative_to(step)).exists()
    assert differences(lab, run) == []


# ---- a photo that stops decoding ---------------------------------------------------------------------------------------


def album(root, pictures):
    """120 people with three photos each, as files."""
    return save_photos(root, pictures[:, :3], "p{:03d}/{}.jpg", quality=95)


@pytest.mark.parametrize("limit", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_photos_that_break_during_a_run_are_named_counted_and_replaced_up_to_a_limit(lab, tmp_path, pictures, limit):
    photos, run = album(tmp_path / "photos", pictures), tmp_path / "run"
    process, log = lab.start(
        run, "--data.source", f"folder:{photos}", "--data.data-dir", str(tmp_path / "data"), "--data.memory-gb", "0",
        "--skip-bad-photos", str(limit),
    )  # fmt: skip
    wait_until(process, log, lambda: chaos.last_logged(run) >= 5, "row 5")
    # People who are trained on: the checkpoint's plan knows nobody else.
    people = np.array(sorted(path.name for path in photos.iterdir()))
    trained = people[splits.split_of(people) == "train"][[3, 30, 60]]
    broken = [photos / name / "1.jpg" for name in trained]

    def damage():
        for path in broken:
            os.truncate(path, 300)

    held(process, damage)
    printed = ended(process, log, status=0 if limit == 10 else 1)
    if limit == 1:
        assert "error: 2 of 3" in printed
        assert "photos of folder:" in printed
        assert "do not decode, more than --skip-bad-photos 1:" in printed
        assert sum(f"{name}/1: " in printed for name in trained) >= 2
        assert "Traceback" not in printed
        return
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    bad = [event for event in events if event["kind"] == "bad photo"]
    assert sorted(event["message"].split(": ")[0] for event in bad) == sorted(f"{name}/1" for name in trained)
    assert all(5 < event["step"] <= STEPS for event in bad)
    for event in bad:
        assert f"step {event['step']}: {event['message']}" in printed
    assert json.loads((run / "results.json").read_text())["bad_photos"] == [f"{name}/1" for name in trained]
    assert "3 photos did not decode in training; others stood in for them" in printed


# ---- another number of devices -----------------------------------------------------------------------------------------

ELASTIC = config.Experiment(
    steps=20,
    data=config.Data(people=120, photos=4),
    preprocess=config.Preprocess(size=16),
    encoder=config.ConvNet(widths=(4, 8), blocks=(1, 1), dim=8),
    batch=config.Batch(people=8, photos=4),
    schedule=config.Schedule(learning_rate=5e-3, warmup=5),
    checkpoint=config.Checkpoint(every=8, log=5),
)


def elastic(run, stages, photos):
    """Trains on so many devices until a step, where a signal comes, then on others.

    Returns:
      (update → what it was shown: people, photos, the augmented images; the parameters at the end; rows of the log).
    """
    shown, original = {}, meshes.to_devices
    views = jax.jit(loop.make_views(ELASTIC))

    def watched(until):
        def to_devices(batches, mesh):
            for number, batch in enumerate(original(batches, mesh), start=1 + max(chaos.saved(run), default=0)):
                assert number not in shown, f"update {number} came twice"
                images = np.asarray(views(np.int32(number - 1), batch["slot"], batch["image"]))
                who, which = (np.asarray(batch[name]).tolist() for name in ("identity", "index"))
                shown[number] = (who, which, images)
                if number == until:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        return to_devices

    for devices, until in stages:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "open_data", lambda *_, **__: photos)
            patch.setattr(meshes, "to_devices", watched(until if until < ELASTIC.steps else None))
            patch.setattr(loop.evaluate, "final_report", lambda *_, **__: {})
            end = pytest.raises(interrupts.Stopped, match=f"stopped by SIGTERM at step {until};")
            with end if until < ELASTIC.steps else contextlib.nullcontext():
                loop.train(ELASTIC, run, devices=devices, progress=False)
    rows = [row for row in chaos.rows_of(run / "metrics.jsonl") if "loss" in row]
    before, params = (chaos.arrays_of(run / "checkpoints" / step / "params")["params"] for step in ("16", "20"))
    assert distance(before, params) > 1e-3, "it still learns at the end, or all would agree"
    return shown, params, rows


def distance(tree, other):
    """Relative L2."""
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(part)]) for part in (tree, other))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory, noise_photos):
    """The uninterrupted run on one device."""
    return elastic(tmp_path_factory.mktemp("one") / "run", [(1, 20)], noise_photos)


@pytest.mark.parametrize(
    "route",
    [
        pytest.param([(8, 7), (4, 13), (1, 20)], id="8-4-1"),
        pytest.param([(1, 11), (8, 20)], id="1-8", marks=pytest.mark.slow),
    ],
)
def test_on_other_devices_a_run_goes_on_with_the_same_people_and_augmentations(
    route, noise_photos, tmp_path, one_device
):
    shown, params, rows = elastic(tmp_path / "run", route, noise_photos)
    expected_shown, expected, expected_rows = one_device
    assert sorted(shown) == list(range(1, 21))
    for number, (who, which, images) in shown.items():
        assert (who, which) == expected_shown[number][:2]
        # Normalised pixels; another compiled program rounds the last bit otherwise.
        np.testing.assert_allclose(images, expected_shown[number][2], atol=1e-5)
    # A sum over a batch has another order on other devices; docs/reliability.md states this tolerance.
    assert distance(params, expected) < 1e-4
    # A signal came in the middle of a row: it covers the updates before it all the same.
    assert [row["step"] for row in rows] == [5, 8, 10, 15, 16, 20]
    for name in ("loss", "grad_norm", "active"):
        found, wanted = ([row[name] for row in table] for table in (rows, expected_rows))
        np.testing.assert_allclose(found, wanted, rtol=1e-3, err_msg=name)


def test_a_run_that_goes_on_remembers_the_photos_that_did_not_decode(noise_photos, tmp_path, monkeypatch):
    """Also one that reads again: what was shown in its place goes on being shown."""
    learn = np.flatnonzero(splits.split_of(noise_photos.people)[noise_photos.identity] == "train")
    bad, good, stops, given = int(learn[5]), set(), [4, None], []

    def read(index):
        if index == bad:
            assert not good, "it is not asked for again"
            raise ValueError("it does not decode")
        return noise_photos.read(index)

    original = meshes.to_devices

    def to_devices(batches, mesh):
        until = stops.pop(0)
        for number, batch in enumerate(original(batches, mesh), start=1):
            if number == until:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(loop, "open_data", lambda *_, **__: dataclasses.replace(noise_photos, read=read))
    monkeypatch.setattr(loop, "make_views", lambda _: lambda step, slot, images: images[:, :16, :16] / 127.5 - 1.0)
    monkeypatch.setattr(meshes, "to_devices", to_devices)
    monkeypatch.setattr(loop.evaluate, "final_report", lambda *_, bad_photos, **__: given.append(bad_photos))
    experiment = dataclasses.replace(ELASTIC, steps=6)
    with pytest.raises(interrupts.Stopped, match="at step 4;"):
        loop.train(experiment, tmp_path / "run", devices=1, progress=False)
    good.add(bad)
    loop.train(experiment, tmp_path / "run", devices=1, progress=False)
    assert given == [[str(noise_photos.keys[bad])]]


def test_the_page_of_promises_names_tests_that_exist():
    text = (chaos.ROOT / "docs" / "reliability.md").read_text()
    file, met = "", 0
    for found, name in re.findall(r"`(test_\w+\.py|…)::([^`]*)`", text):
        file = file if found == "…" else found
        assert re.search(rf"^def {name}\(", (chaos.ROOT / "tests" / file).read_text(), re.MULTILINE), f"{file}::{name}"
        met += 1
    assert met > 20
    promises = [
        line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| what", "| ---"))
    ]
    assert len(promises) > 10
    for promise in promises:
        assert "::test_" in promise.split(" | ")[-1], promise
        assert not re.search(r"`test_\w+\.py`", promise), f"which test of the file: {promise}"

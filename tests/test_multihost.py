"""Many processes: two real ones over loopback, with four virtual devices each, are one with eight."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from faceembed import config, evaluate, processes
from faceembed import mesh as meshes
from faceembed.data import sampling, sources
from tests.conftest import xla_flags
from tests.test_train import metrics_of, state_of

ROOT = Path(__file__).parents[1]
STEPS, HALF = 20, 10


def experiment(folder, **changes):
    """A network that compiles in seconds, on photos of noise that are read as they are used."""
    return config.Experiment(
        steps=STEPS,
        preprocess=config.Preprocess(size=16),
        encoder=config.ConvNet(widths=(8,), blocks=(1,), dim=8),
        data=config.Data(source=f"folder:{folder / 'photos'}", data_dir=str(folder / "data"), memory_gb=0),
        batch=config.Batch(people=8, photos=4),
        schedule=config.Schedule(learning_rate=5e-3, warmup=5, ema=0.9, weight_decay=1e-2),
        checkpoint=config.Checkpoint(every=HALF, log=1, keep_best=2),
        **changes,
    )


# What a process does: it trains experiments one after another, alone or as one of two, and writes down what it saw.
TRAINS = """
import contextlib, dataclasses, io, json, os, signal, sys, threading
from pathlib import Path
from faceembed import checkpoint, config, evaluate, processes
from faceembed.data import pipeline

# What Python says, and not what XLA's collectives write to the same descriptor, from several threads at once.
said = sys.stdout = io.StringIO()
folder, name, port, process = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
evaluate.final_report = lambda run, *_, **__: {"report of": run.name}
processes.SEEN_SECONDS = 1
seen = {"reads": {}, "written": [], "returned": {}, "refused": {}}
lock, crop = threading.Lock(), pipeline._crop

broken = json.loads((folder / "broken.json").read_text())

def watched(photos, index, *rest):
    key = str(photos.keys[index])
    with lock:
        seen["reads"].setdefault(run, []).append(key)
    if run == "stopped" and process == 1 and len(seen["reads"][run]) == 16 * 5 and "stopped" not in seen["refused"]:
        os.kill(os.getpid(), signal.SIGTERM)
    if run == "broken" and key in broken:
        raise ValueError(f"{key}: cannot be decoded")
    return crop(photos, index, *rest)

def opened(event, arguments):
    if event == "open" and str(folder / "runs") in str(arguments[0]) and set(str(arguments[1])) & set("wax+"):
        seen["written"].append(str(arguments[0]))

pipeline._crop = watched
sys.addaudithook(opened)
place = {"coordinator": f"127.0.0.1:{port}", "num_processes": 2, "process_id": process, "join_seconds": 120}
with processes.joined(**place) if int(port) else contextlib.nullcontext():
    import jax
    from faceembed.training import interrupts, loop

    seen["devices"] = [jax.local_device_count(), jax.device_count()]
    for run in sys.argv[5:]:
        about = config.from_json((folder / ("float64.json" if "64" in run else "float32.json")).read_text())
        options = {"devices": 1} if run == "moved1" else {"shard_optimizer": run == "divided"}
        try:
            seen["returned"][run] = loop.train(
                about, folder / "runs" / run, progress=False, skip_bad_photos=3, **options
            )
        except interrupts.Stopped as stopped:
            seen["refused"][run] = str(stopped)
    own = folder / f"own{process}"  # of its photos, those of process 1 lack one
    os.chdir(own)
    here = dataclasses.replace(about, data=config.Data(source="folder:photos", data_dir=str(own), memory_gb=0))

    def other_listing():  # what process 1's host remembers of the directory is older
        if process:
            checkpoint.Checkpoints.latest = property(lambda _: 10)
        loop.train(about, folder / "runs" / "fresh", progress=False)

    for what, check in {
        "own directory": lambda: loop.train(about, Path("own")),
        "other photos": lambda: loop.train(here, folder / "runs" / "other", progress=False),
        "other flags": lambda: loop.train(config.Experiment(steps=5 + process), folder / "runs" / "other"),
        "other devices": lambda: loop.train(about, folder / "runs" / "other", shard_optimizer=bool(process)),
        "other facts": lambda: processes.require_same("facts", {"a": {"photos": 7 + process}, "b": 1}),
        "other checkpoints": other_listing,
    }.items() if name == "two" else ():
        try:
            check()
        except ValueError as error:
            seen["refused"][what] = str(error)
    print("only process 0 says this")
seen["said"] = said.getvalue()
(folder / f"{name}{process}.json").write_text(json.dumps(seen))
"""

# Two processes of which one comes to grief, while the other computes with it or waits for it.
GRIEF = """
import sys, time
from faceembed import processes

port, process, does, heartbeat = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
with processes.joined(
    coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=process, join_seconds=60, heartbeat_seconds=heartbeat
):
    import jax

    print("joined", file=sys.stderr, flush=True)
    if does == "raises":
        time.sleep(1)
        raise ValueError("the disk is full")
    if does == "waits":
        processes.from_all("never", None)
    while does == "computes":
        processes._talk(jax.devices())
    time.sleep(600)
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def start(*arguments, devices=4, cache=None, platform="cpu"):
    """A Python process with virtual devices."""
    flags = xla_flags(devices)
    # Eight devices on a busy processor or two may keep each other waiting for more than the usual half a minute.
    flags += " --xla_cpu_collective_timeout_seconds=300 --xla_cpu_collective_call_terminate_timeout_seconds=300"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
    environment |= {"JAX_PLATFORMS": platform, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if cache:  # a second program like the first is not compiled again
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


@contextlib.contextmanager
def ended(*started):
    """Kills what still runs at the end."""
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    draw = np.random.default_rng(0)
    for who in range(120):
        person = folder / "photos" / f"p{who:03d}"
        person.mkdir(parents=True)
        face = draw.integers(0, 256, (16, 16, 3))
        for number in range(4):
            pixels = (face + draw.integers(0, 256, (16, 16, 3))) // 2
            Image.fromarray(pixels.astype(np.uint8)).save(person / f"{number}.png")
    for process in (0, 1):
        shutil.copytree(folder / "photos", folder / f"own{process}" / "photos")
    (folder / "own1" / "photos" / "p000" / "0.png").unlink()
    for precision, loss in (("float32", config.Triplet()), ("float64", config.Contrastive())):
        about = experiment(folder, precision=precision, loss=loss)
        (folder / f"{precision}.json").write_text(config.to_json(about))
    # Photos that only one of two processes reads: two of the second's, one of the first's.
    learn = evaluate.split_photos(open_photos(folder))["train"]
    plan = sampling.make_sampler(learn.identity, people=8, photos=4, seed=0)
    reads = [set(np.concatenate([sampling.share(plan.batch(step), p, 2) for step in range(STEPS)])) for p in (0, 1)]
    chosen = sorted(reads[1] - reads[0])[:2] + sorted(reads[0] - reads[1])[:1]
    (folder / "broken.json").write_text(json.dumps([str(learn.keys[index]) for index in chosen]))
    return folder


def open_photos(folder):
    return sources.open_source(f"folder:{folder / 'photos'}", data_dir=folder / "data", progress=False)


def trains(folder, name, *runs, several=False):
    """Processes that train these runs: one with eight devices, or two with four."""
    port, count = (free_port(), 2) if several else (0, 1)
    return ended(
        *(
            start("-c", TRAINS, folder, name, port, number, *runs, devices=8 // count, cache=folder / "xla")
            for number in range(count)
        )
    )


def outcome(folder, name, started):
    """What each process saw and said."""
    outputs = [process.communicate(timeout=500) for process in started]
    assert [process.returncode for process in started] == [0] * len(started), outputs
    return [json.loads((folder / f"{name}{number}.json").read_text()) for number in range(len(started))]


def cut_in_half(run, copy):
    """A run that stands at its first checkpoint."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / str(STEPS))


@pytest.fixture(scope="module")
def trained(folder):
    """Runs of one process with eight devices and of two with four: (their folder, what each of the two saw)."""
    runs = folder / "runs"
    with (
        trains(folder, "one", "one", "one64") as one,
        trains(folder, "two", "fresh", "fresh64", "broken", "stopped", "stopped", several=True) as two,
    ):
        seen = outcome(folder, "two", two)
        outcome(folder, "one", one)
    return runs, seen


def losses(run):
    return np.array([row["loss"] for row in metrics_of(run) if "loss" in row])


def apart(run, other, item="params"):
    """Relative L2 of the last checkpoints' difference."""
    sides = [
        [np.ravel(x).astype(np.float64) for name, x in sorted(state_of(side, STEPS).items()) if name.startswith(item)]
        for side in (run, other)
    ]
    a, b = (np.concatenate(side) for side in sides)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_two_processes_take_the_steps_of_one(trained):
    runs, seen = trained
    assert [part["devices"] for part in seen] == [[4, 8], [4, 8]]
    one, two = losses(runs / "one"), losses(runs / "fresh")
    assert len(one) == STEPS
    assert one.min() > 0.05
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-4)
    for item in ("params", "train"):
        assert apart(runs / "fresh", runs / "one", item) < 1e-3
    scores = [[row["select_auc"] for row in metrics_of(runs / run) if "select_auc" in row] for run in ("one", "fresh")]
    np.testing.assert_allclose(*scores, atol=0.02)
    assert json.loads((runs / "fresh" / "environment.json").read_text())["processes"] == 2


def test_in_float64_to_the_ninth_digit(trained):
    runs = trained[0]
    assert {x.dtype for name, x in state_of(runs / "fresh64", STEPS).items() if "kernel" in name} == {np.dtype("f8")}
    np.testing.assert_allclose(losses(runs / "fresh64"), losses(runs / "one64"), rtol=0, atol=1e-9)
    for item in ("params", "train"):
        assert apart(runs / "fresh64", runs / "one64", item) < 1e-9


def test_each_process_reads_its_share_of_each_batch_and_the_first_alone_evaluates(trained, folder):
    seen = trained[1]
    people_of = evaluate.split_photos(open_photos(folder))
    learn = people_of["train"]
    plan = sampling.make_sampler(learn.identity, people=8, photos=4, seed=0)
    select = Counter(map(str, people_of["select"].keys))
    for process, evaluated in ((0, select), (1, Counter())):
        share = [sampling.share(plan.batch(step), process, 2) for step in range(STEPS)]
        expected = Counter(map(str, learn.keys[np.concatenate(share)])) + evaluated
        assert Counter(seen[process]["reads"]["fresh"]) == expected


def test_only_the_first_process_writes_and_speaks(trained):
    runs, seen = trained
    written = {Path(path).name for path in seen[0]["written"] if str(runs / "fresh") in path}
    assert any("metrics.jsonl" in name for name in written)
    assert any("environment.json" in name for name in written)
    # Orbax saves from both: arrays through a library of its own, and of metadata each process its own.
    assert [path for path in seen[1]["written"] if not path.endswith("/array_metadatas/process_1")] == []
    arrays = runs / "fresh" / "checkpoints" / str(STEPS) / "params"
    assert {path.name for path in arrays.glob("ocdbt.process_*")} == {"ocdbt.process_0", "ocdbt.process_1"}
    assert [part["returned"]["fresh"] for part in seen] == [{"report of": "fresh"}, None]
    assert "only process 0 says this" in seen[0]["said"]
    assert "2 processes, by --coordinator, on " in seen[0]["said"]
    assert seen[1]["said"] == ""


def test_sigterm_to_one_process_stops_all_after_the_same_update_and_they_go_on(trained):
    runs, seen = trained
    one, other = (part["refused"]["stopped"] for part in seen)
    assert one == other
    step = int(re.fullmatch(r"stopped by SIGTERM at step (\d+); saved; the same command goes on", one)[1])
    assert 0 < step < STEPS
    assert f"stopped: going on from step {step} of {STEPS}" in seen[0]["said"]
    goes_on_like(runs / "stopped", runs / "fresh")


def test_photos_that_break_in_any_process_are_told_by_the_first_and_saved(trained, folder):
    runs, seen = trained
    broken = json.loads((folder / "broken.json").read_text())
    events = [json.loads(line) for line in (runs / "broken" / "events.jsonl").read_text().splitlines()]
    told = [event for event in events if event["kind"] == "bad photo"]
    assert sorted(event["message"].split(": ")[0] for event in told) == sorted(broken)
    for event in told:
        assert "cannot be decoded; a photo of the same person is shown in its place from here on." in event["message"]
        assert f"step {event['step']}: {event['message']}" in seen[0]["said"]
    data = runs / "broken" / "checkpoints" / str(STEPS) / "data" / "metadata"
    assert sorted(json.loads(data.read_text())["bad_photos"]) == sorted(broken)


def goes_on_like(run, whole):
    assert [row["step"] for row in metrics_of(run) if "loss" in row] == [*range(1, STEPS + 1)]
    np.testing.assert_allclose(losses(run), losses(whole), rtol=0, atol=1e-4)
    assert 0 < apart(run, whole) < 1e-3


@pytest.mark.slow
def test_two_processes_go_on_with_the_checkpoint_of_one(trained, folder):
    runs, moved = trained[0], ("moved", "divided")  # the second divides its optimizer over both processes
    for run in moved:
        cut_in_half(runs / "one", runs / run)
    with trains(folder, "going on", *moved, several=True) as two:
        outcome(folder, "going on", two)
    for run in moved:
        goes_on_like(runs / run, runs / "one")


@pytest.mark.slow
def test_one_process_goes_on_with_the_checkpoint_of_two(trained, folder):
    runs, moved = trained[0], ("moved8", "moved1")
    for run in moved:
        cut_in_half(runs / "fresh", runs / run)
    with trains(folder, "going on", *moved) as one:
        outcome(folder, "going on", one)
    for run in moved:
        goes_on_like(runs / run, runs / "one")


def test_processes_that_were_started_differently_are_refused_by_all(trained):
    (one, other), host = (part["refused"] for part in trained[1]), socket.gethostname()
    assert one == other
    assert f"own on process 0 is another directory than on process 1 on {host}: " in one["own directory"]
    assert "a file system that all hosts share" in one["own directory"]
    assert "the same photos:\n  photos is " in one["other photos"]
    assert "\n  fingerprint is " in one["other photos"]
    assert "the same flags:\n  shard_optimizer is True in process 1, False in process 0\n" in one["other devices"]
    assert "the same checkpoints:\n  step is 10 in process 1, 20 in process 0\n" in one["other checkpoints"]
    assert "the same facts:\n  a.photos is 8 in process 1, 7 in process 0\nStart all" in one["other facts"]
    assert "the same flags:\n  steps is 6 in process 1, 5 in process 0\n" in one["other flags"]


# ---- one is missing, or dies -------------------------------------------------------------------------------------------


def test_a_start_without_all_processes_fails_in_each_that_is_there(tmp_path):
    port, seconds = free_port(), 5
    flags = ("launch.py", "train", "quickstart", "--run-dir", tmp_path / "run", "--coordinator", f"127.0.0.1:{port}",
             "--num-processes", "3", "--join-timeout", seconds)  # fmt: skip
    begun = time.monotonic()
    with ended(*(start(*flags, "--process-id", number) for number in (0, 2))) as started:
        told = [process.communicate(timeout=60)[1] for process in started]
    assert time.monotonic() - begun < seconds + processes.GRACE_SECONDS + 30  # for Python to start
    assert [process.returncode for process in started] == [1, 1]
    for text in told:
        assert "error: 2 of 3 processes joined within 5 s; missing: 1." in text
        assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("victim", "does", "how", "told"),
    [
        (1, "computes", "killed", "process 1 of 2 (HOST) is gone without a word"),
        (0, "waits", "killed", "process 0 of 2 (HOST) is gone without a word"),
        (1, "waits", "raises", "process 1 of 2 (HOST) stopped: ValueError: the disk is full. So process 0"),
        pytest.param(
            0, "computes", "raises", "process 0 of 2 (HOST) stopped: ValueError: the disk is full. So process 1",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_when_one_process_ends_the_other_does_and_says_why(victim, does, how, told):
    port = free_port()
    deeds = {victim: "raises" if how == "raises" else does, 1 - victim: does}
    with ended(*(start("-c", GRIEF, port, number, deeds[number], 100) for number in range(2))) as started:
        for process in started:
            wait_for_line(process, "joined")
        if how == "killed":
            started[victim].kill()
        began = time.monotonic()
        _, text = started[1 - victim].communicate(timeout=100)
        assert time.monotonic() - began < processes.GRACE_SECONDS
        assert started[1 - victim].returncode == 1
        assert told.replace("HOST", socket.gethostname()) in text
        if how == "raises":
            mine = started[victim].communicate(timeout=60)[1]
            assert started[victim].returncode == 1
            assert "stops, and the others with it:" in mine
            assert "ValueError: the disk is full" in mine
            assert "So process" not in mine


def test_a_process_that_cannot_start_jax_ends_the_others_at_once_with_its_reason():
    port = free_port()
    with ended(
        start("-c", GRIEF, port, 0, "waits", 100), start("-c", GRIEF, port, 1, "waits", 100, platform="cuda")
    ) as both:
        told = [process.communicate(timeout=60)[1] for process in both]
        assert [process.returncode for process in both] == [1, 1]
    assert f"process 1 of 2 ({socket.gethostname()}) stopped: " in told[0]
    assert f"process 1 of 2 ({socket.gethostname()}) stops, and the others with it:" in told[1]
    assert "is gone without a word" not in told[0] + told[1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_is_cut_off_ends_the_others_by_its_silence(victim):
    """A stopped process keeps its connections and says nothing, as a host without power does."""
    port, heartbeat = free_port(), 10
    with ended(*(start("-c", GRIEF, port, number, "waits", heartbeat) for number in range(2))) as started:
        for process in started:
            wait_for_line(process, "joined")
        os.kill(started[victim].pid, signal.SIGSTOP)
        began = time.monotonic()
        _, text = started[1 - victim].communicate(timeout=100)
        assert time.monotonic() - began < heartbeat + processes.GRACE_SECONDS
        assert started[1 - victim].returncode != 0
        assert "the JAX distributed service detected fatal errors" in text


def two_train(folder, run, *more):
    """The command as it is typed on two hosts."""
    port = free_port()
    flags = (
        "launch.py", "train", "quickstart", "--data.source", f"folder:{folder / 'photos'}", "--data.data-dir",
        folder / "data", "--preprocess.size", 16, "--encoder.widths", 8, "--encoder.blocks", 1, "--encoder.dim", 8,
        "--batch.people", 8, "--steps", 60, "--checkpoint.every", 10, "--checkpoint.log", 1, "--no-progress",
        "--run-dir", run, "--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, *more,
    )  # fmt: skip
    return ended(*(start(*flags, "--process-id", number, cache=folder / "xla") for number in range(2)))


def wait_for_step(run, step, started):
    deadline = time.monotonic() + 240
    while not (run / "checkpoints" / str(step)).exists():
        assert time.monotonic() < deadline
        assert [process.poll() for process in started] == [None, None]
        time.sleep(0.01)


def finished(run, started):
    """What process 0 printed of a run that ends."""
    told = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    assert [row["step"] for row in metrics_of(run) if "loss" in row] == [*range(1, 61)]
    assert (run / "report.html").exists()
    assert not list(run.glob(".shared-*"))
    return told[0][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "flags"),
    [
        # What divides arrays over both hosts, and what chunks a batch.
        (1, ("--loss", "arcface", "--batch.microbatches", 2, "--shard-optimizer")),
        (0, ("--loss.memory", 64, "--loss.tile", 8, "--batch.microbatches", 4)),
    ],
)
def test_sigterm_to_one_process_stops_all_after_the_same_update(folder, tmp_path, victim, flags):
    run = tmp_path / "run"
    with two_train(folder, run, *flags) as started:
        wait_for_step(run, 10, started)
        started[victim].send_signal(signal.SIGTERM)
        told = [process.communicate(timeout=100) for process in started]
        assert [process.returncode for process in started] == [0, 0], told
    assert not (run / "results.json").exists(), "the signal came too late to mean anything"
    step = int(re.search(r"stopped by SIGTERM at step (\d+); saved; the same command goes on", told[0][0])[1])
    assert "Traceback" not in told[0][1] + told[1][1]
    with two_train(folder, run, *flags) as started:
        assert f"going on from step {step} of 60" in finished(run, started)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_a_training_which_goes_on_with_the_same_command(folder, tmp_path, victim):
    run = tmp_path / "run"
    with two_train(folder, run) as started:
        wait_for_step(run, 10, started)
        started[victim].kill()
        _, text = started[1 - victim].communicate(timeout=100)
        assert started[1 - victim].returncode == 1
        assert f"process {victim} of 2 ({socket.gethostname()}) is gone without a word" in text
        assert not (run / "results.json").exists(), "the kill came too late to mean anything"
    with two_train(folder, run) as started:
        assert "going on from step" in finished(run, started)


def wait_for_line(process, text):
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"ended without {text!r}")


# ---- joining, without JAX ----------------------------------------------------------------------------------------------


def place(process, of=2, port=0):
    return processes.Place(process, of, "127.0.0.1", port, "--coordinator")


def meet(*calls):
    """What each call returned, or the text of the error it raised; all at once."""
    results = [None] * len(calls)

    def run(number, call):
        try:
            results[number] = call()
        except Exception as error:
            results[number] = f"{type(error).__name__}: {error}"  # the error itself would keep sockets open

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def hang_up(*results):
    for result in results:
        for line in result[0].values():
            line.close()


def sides(port, *callers, of=2, seconds=10):
    """Process 0 with others that call it."""
    first = lambda: processes._receive_all(place(0, of, port), seconds)  # noqa: E731
    return meet(first, *(lambda who=who: processes._call(who, seconds) for who in callers))


def test_all_join_in_any_order_and_learn_of_each_other(monkeypatch):
    port = int(free_port())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    def late():
        time.sleep(0.7)  # the others call before anybody listens
        return processes._receive_all(place(0, 3, port), 20)

    results = meet(late, *(lambda who=who: processes._call(place(who, 3, port), 20) for who in (2, 1)))
    hang_up(*results)
    assert [sorted(lines) for lines, _ in results] == [[1, 2], [0], [0]]
    for _, everyone in results:
        assert [hello["process"] for hello in everyone] == [0, 1, 2]
        assert everyone[0]["gpus"] == "0,1"


def test_other_numbers_of_processes_are_refused_on_both_sides():
    port = int(free_port())
    results = sides(port, place(1, 4, port))
    for told in results:
        assert "ValueError: process 1 on " in told
        assert "was started as one of 4 processes, and process 0 as one of 2" in told


def test_one_number_given_to_two_processes_is_refused():
    port = int(free_port())
    results = sides(port, place(1, 3, port), place(1, 3, port), of=3)
    for told in results:
        assert "has a process 1 already. Give each its own --process-id, 0 to 2." in told


def test_another_version_is_refused(monkeypatch):
    port = int(free_port())
    hello = processes._hello
    monkeypatch.setattr(processes, "_hello", lambda who: {**hello(who), "faceembed": f"0.{who.process}"})
    monkeypatch.setattr(processes.faceembed, "__version__", "0.0")
    for told in sides(port, place(1, 2, port)):
        assert "has faceembed 0.1, and process 0 0.0. Install one version." in told


def test_strangers_who_call_do_not_count():
    port = int(free_port())

    def stranger():
        time.sleep(0.3)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            time.sleep(0.2)

    (first, other, _) = meet(
        lambda: processes._receive_all(place(0, 2, port), 20),
        lambda: time.sleep(0.8) or processes._call(place(1, 2, port), 20),
        stranger,
    )
    hang_up(first, other)
    assert sorted(first[0]) == [1]
    assert sorted(other[0]) == [0]


def test_a_process_that_left_before_all_were_there_is_missing(monkeypatch):
    monkeypatch.setattr(processes, "GRACE_SECONDS", 2)
    port = int(free_port())
    first, left, two = meet(
        lambda: processes._receive_all(place(0, 3, port), 4),
        lambda: processes._call(place(1, 3, port), 0.1),
        lambda: time.sleep(2.5) or processes._call(place(2, 3, port), 2),
    )
    assert "2 of 3 processes joined within 0.1 s; missing: 2." in left
    assert "2 of 3 processes joined within 4 s; missing: 1." in first
    assert "missing: 1." in two


def test_nobody_there_says_where_it_looked():
    port = free_port()
    with (
        pytest.raises(TimeoutError, match=f"process 1 of 2 has not reached process 0 at 127.0.0.1:{port} within 0.1 s"),
        processes.joined(coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=1, join_seconds=0.1),
    ):
        pass
    with (
        pytest.raises(TimeoutError, match="1 of 2 processes joined within 0.1 s; missing: 1."),
        processes.joined(coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=0, join_seconds=0.1),
    ):
        pass


def test_a_port_that_is_taken_says_so():
    with (
        socket.create_server(("", 0)) as other,
        pytest.raises(ValueError, match="is to listen on port .* cannot here .*Try another --coordinator"),
    ):
        processes._receive_all(place(0, 2, other.getsockname()[1]), 1)


def test_a_program_that_is_not_ours_is_not_process_0():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def answers():
            other.settimeout(3)
            with contextlib.suppress(TimeoutError):
                while True:
                    with other.accept()[0] as connection:
                        connection.sendall(b"\x00\x00\x12\x04\n")

        told, _ = meet(lambda: processes._call(place(1, 2, port), 1.0), answers)
    assert "what answers there is no process 0 of faceembed" in told


# ---- flags and launchers -----------------------------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch):
    """No launcher."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    return monkeypatch


SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_NODELIST": "gpu[03-06]"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
OMPI4 = OMPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"hosts": "single", "coordinator": "a:1"}, "--coordinator is for several. Leave out --hosts single, or --coord"),
        ({"hosts": "single", "process_id": 0}, "--process-id is for several"),
        ({"hosts": "multi"}, "neither Slurm, Open MPI nor an indexed Kubernetes job .*--coordinator HOST:PORT"),
        ({"coordinator": "a:1"}, "--coordinator alone does not say .*: add --num-processes N --process-id I"),
        ({"num_processes": 2, "process_id": 0}, "add --coordinator HOST:PORT"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "--process-id is 2, and of 2 processes"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": -1}, "--process-id is -1"),
        ({"coordinator": "a:1", "num_processes": 1, "process_id": 0}, "--num-processes is 1: it counts 2 or more"),
        ({"coordinator": "node7", "num_processes": 2, "process_id": 0}, "expected HOST:PORT.*--coordinator node7:9473"),
        ({"coordinator": "a:http", "num_processes": 2, "process_id": 0}, "--coordinator a:9473"),
        ({"coordinator": "a:70000", "num_processes": 2, "process_id": 0}, "--coordinator a:9473"),
    ],
)  # fmt: skip
def test_contradictory_flags_say_what_to_type(bare, flags, told):
    with pytest.raises(ValueError, match=f"(?s){told}"):
        processes.placed(**flags)


def test_the_command_line_refuses_them_before_anything_starts(tmp_path):
    flags = ("--hosts", "single", "--coordinator", "node1:9473", "--run-dir", tmp_path / "run")
    with ended(start("launch.py", "train", "quickstart", *flags)) as (process,):
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert told.startswith("error: --hosts single trains in one process alone")
    assert not (tmp_path / "run").exists()


def test_a_time_to_join_is_positive():
    with (
        pytest.raises(ValueError, match="--join-timeout is 0: .*Try --join-timeout 300"),
        processes.joined(join_seconds=0),
    ):
        pass


def launched(patch, variables):
    for name, value in variables.items():
        patch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "flags", "expected"),
    [
        ({}, {}, None),
        (SLURM, {}, (2, 4, "gpu03", 65535 - 4095 + 7, "Slurm")),
        (SLURM, {"hosts": "multi"}, (2, 4, "gpu03", 65535 - 4095 + 7, "Slurm")),
        (SLURM, {"hosts": "single"}, None),
        (SLURM, {"coordinator": "ib0:5000"}, (2, 4, "ib0", 5000, "Slurm")),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}, None),
        (OMPI4, {}, (1, 2, "10.96.0.1", 65535 - 4095 + 1531576320 // 4096 % 4096, "Open MPI")),
        (OMPI, {"coordinator": "node1:5000"}, (1, 2, "node1", 5000, "Open MPI")),
        (OMPI4 | SLURM, {"coordinator": "node1:5000"}, (1, 2, "node1", 5000, "Open MPI")),
        (
            SLURM,
            {"coordinator": "[::1]:5000", "num_processes": 3, "process_id": 0},
            (0, 3, "::1", 5000, "--coordinator"),
        ),
        # A batch script, a notebook in a pod: nobody has started others beside it.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, {}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, {}, None),
    ],
)
def test_launchers_are_found_and_flags_go_before_them(bare, variables, flags, expected):
    launched(bare, variables)
    found = processes.placed(**flags)
    assert (found and dataclasses.astuple(found)) == expected


@pytest.mark.parametrize(
    ("variables", "flags", "told"),
    [
        (OMPI, {}, "Open MPI does not say the rest: add --coordinator HOST:PORT, or --hosts single"),
        (SLURM | {"SLURM_NTASKS": "1"}, {"hosts": "multi"}, "Slurm has started one process. Start more, such as srun"),
        (KUBERNETES, {}, "pip install kubernetes. Or name the others: .*JOB_COMPLETION_INDEX"),
    ],
)
def test_a_launcher_that_says_too_little_is_no_reason_to_train_n_times(bare, variables, flags, told):
    """Each process would train alone, and nobody would notice for hours."""
    launched(bare, variables)
    bare.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(ValueError, match=told):
        processes.placed(**flags)


def test_an_indexed_kubernetes_job_is_asked_for_its_pods(bare):
    from jax._src import clusters

    launched(bare, KUBERNETES)
    bare.setitem(sys.modules, "kubernetes", types.ModuleType("kubernetes"))
    cluster = clusters.K8sCluster
    bare.setattr(cluster, "is_env_present", classmethod(lambda cls: True))
    bare.setattr(cluster, "get_process_count", classmethod(lambda cls: 2))
    bare.setattr(cluster, "get_coordinator_address", classmethod(lambda cls, *_: "job-0.pods:55527"))
    assert dataclasses.astuple(processes.placed()) == (1, 2, "job-0.pods", 55527, "Kubernetes")

    def forbidden(cls):
        raise RuntimeError("Kubernetes API Error: 403 - Forbidden")

    bare.setattr(cluster, "get_process_count", classmethod(forbidden))
    with pytest.raises(ValueError, match="403 - Forbidden\nOr name the others: --coordinator JOB-0.SERVICE:9473"):
        processes.placed()


@pytest.mark.parametrize(
    ("hosts", "gpus", "expected"),
    [
        ("ab", [None, None], [None, None]),  # one process drives all GPUs of its host
        ("aabb", [None] * 4, [[0], [1], [0], [1]]),
        ("abab", ["0,1"] * 4, [[0], [0], [1], [1]]),
        ("aa", ["0", "0"], [None, None]),  # each in a container with one GPU
        ("aa", ["0,1", "2,3"], [None, None]),  # divided already
    ],
)
def test_processes_on_one_host_divide_its_gpus(bare, hosts, gpus, expected):
    hellos = [{"host": host, "gpus": visible} for host, visible in zip(hosts, gpus, strict=True)]
    assert [processes.visible_devices(process, hellos) for process in range(len(hellos))] == expected
    bare.setenv("JAX_LOCAL_DEVICE_IDS", "0")
    assert processes.visible_devices(0, hellos) is None  # JAX reads it


# ---- devices of several processes --------------------------------------------------------------------------------------


def devices_of(*processes_and_ids):
    return [types.SimpleNamespace(process_index=process, id=number) for process, number in processes_and_ids]


def test_a_process_has_the_devices_that_its_share_of_a_batch_goes_to():
    mixed = devices_of((1, 9), (0, 3), (1, 8), (0, 2))
    ordered = [(device.process_index, device.id) for device in meshes.by_process(mixed)]
    assert ordered == [(0, 2), (0, 3), (1, 8), (1, 9)]
    for process in range(2):
        share = sampling.share(np.arange(4), process, 2)
        assert [ordered[slot][0] for slot in share] == [process] * 2
    with pytest.raises(ValueError, match="equally many devices: process 0 has 2, process 1 has 1"):
        meshes.by_process(mixed[1:])


def test_several_processes_use_all_their_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert meshes.make_mesh(8).shape == {"data": 8, "model": 1}
    with pytest.raises(ValueError, match="--devices is 4, and 2 processes have 8: .*Leave --devices out"):
        meshes.make_mesh(4)

"""Checkpoints: what is saved is what was there, the right steps are kept and found, and a run has one owner."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from faceembed import checkpoint, config, embed, losses, report
from faceembed.training import step as steps

ROOT = Path(__file__).parents[1]
HOST = re.escape(socket.gethostname())
TINY = config.Experiment(
    steps=9,
    preprocess=config.Preprocess(size=16),
    encoder=config.ConvNet(widths=(4, 8), blocks=(1, 1), dim=8),
    loss=config.PairLogistic(),
    optimizer=config.AdamW(b2=0.99),
)
HOLDER = """
import sys, time
from pathlib import Path
from faceembed import checkpoint
with checkpoint.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""
WRITER = """
import sys
from pathlib import Path
from faceembed import report
print("ready", flush=True)
for number in range(200):
    report.write_text(Path(sys.argv[1]), "ab"[number % 2] * 300_000)
"""


@pytest.fixture(scope="module")
def fresh():
    """A state in which every leaf differs from every other, so that none can be taken for another."""
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(lambda count: 0.1 / (1 + count)))
    loss_params = {"weight": jnp.ones(8), "bias": jnp.zeros(())}
    state = steps.init_state(
        embed.build_encoder(TINY), optimizer, seed=3, size=16, loss_params=loss_params, dtype=jnp.float32,
        memory=losses.remember(losses.init_memory(5, 8), jnp.ones((3, 8)), jnp.arange(3)),
    )  # fmt: skip
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype) if x.dtype == jnp.float32 else x, state
    )


def at(state, step):
    """A copy of a state, as it is after so many steps: all its numbers differ from those of other steps."""
    moved = jax.tree.map(lambda x: x + step if x.dtype == jnp.float32 else jnp.copy(x), state)
    return moved.replace(step=jnp.int32(step), skipped=jnp.int32(step % 2))


@contextlib.contextmanager
def child(code, path):
    """A process of its own that runs some Python on a path; killed at the end if it still runs."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def kept(run):
    return sorted(int(step.name) for step in (run / "checkpoints").iterdir() if step.name.isdigit())


def fake_step(run, step, score):
    """The part of a step directory that choosing one reads."""
    folder = run / "checkpoints" / str(step)
    for item in ("params", "metrics"):
        (folder / item).mkdir(parents=True)
    (folder / "metrics" / "metrics").write_text(json.dumps({"score": score}))
    return folder


def test_what_was_saved_is_restored_bit_for_bit(fresh, tmp_path):
    state = at(fresh, 7)
    wanted = jax.tree.map(np.array, state)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(state, TINY, {"people": ["Ann", "Bo"]}, 0.5)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 7
        restored = checkpoints.restore(at(fresh, 0))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert checkpoint.fingerprint(restored) == checkpoint.fingerprint(wanted)

    experiment, variables, data = checkpoint.read_evaluation(tmp_path)
    assert experiment == TINY
    assert data == {"people": ["Ann", "Bo"], "step": 7}
    # The averages, and neither the parameters nor the statistics of the last batches.
    assert checkpoint.fingerprint(variables) == checkpoint.fingerprint(wanted.ema)
    assert checkpoint.fingerprint(variables["params"]) != checkpoint.fingerprint(wanted.params["encoder"])
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(variables))
    by_step = checkpoint.read_evaluation(tmp_path / "checkpoints" / "7")
    assert checkpoint.fingerprint(by_step[1]) == checkpoint.fingerprint(variables)


def test_the_newest_step_is_restored_and_the_best_is_read(fresh, tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        for step, score in ((1, 0.6), (2, 0.9), (3, 0.7)):
            checkpoints.save(at(fresh, step), TINY, {}, score)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(at(fresh, 0))
    assert checkpoint.fingerprint(restored) == checkpoint.fingerprint(at(fresh, 3))
    _, variables, data = checkpoint.read_evaluation(tmp_path)
    assert data["step"] == 2
    assert checkpoint.fingerprint(variables) == checkpoint.fingerprint(at(fresh, 2).ema)


def test_saving_goes_on_while_the_state_is_given_to_an_update(fresh, tmp_path):
    # Enough bytes that a save is still under way when the update runs.
    heavy = fresh.replace(ema={**fresh.ema, "batch_stats": {"heavy": jnp.ones((1 << 20, 4))}})
    update = jax.jit(lambda state: jax.tree.map(lambda x: ~x if x.dtype == bool else -x - 1, state), donate_argnums=0)
    twin = at(heavy, 1)
    wanted = checkpoint.fingerprint(jax.tree.map(jnp.copy, twin))
    update(twin)
    assert twin.ema["batch_stats"]["heavy"].is_deleted(), "an update takes the buffers of what it is given"

    state = at(heavy, 1)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, TINY, {}, 0.5)
        after = update(state)
        for _ in range(2):  # new arrays, in memory that was given back
            after = update(after)
        jax.block_until_ready(after)
    # -x - 1 three times over: the save has not kept the updates from their numbers either.
    assert float(after.ema["batch_stats"]["heavy"][0, 0]) == -3
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoint.fingerprint(checkpoints.restore(at(heavy, 0))) == wanted


def test_the_best_and_the_latest_two_steps_are_kept_also_after_reopening(fresh, tmp_path):
    def save(*scored):
        with checkpoint.Checkpoints(tmp_path) as checkpoints:
            for step, score in scored:
                checkpoints.save(at(fresh, step), TINY, {}, score)

    save((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.6))
    assert kept(tmp_path) == [2, 3, 4]
    # The score of step 2 is read from disk now.
    save((5, 0.8))
    assert kept(tmp_path) == [2, 4, 5]
    save((6, 0.95), (7, 0.1), (8, 0.2))
    assert kept(tmp_path) == [6, 7, 8]
    assert checkpoint.find_step(tmp_path).name == "6"


def test_as_many_of_the_best_are_kept_as_asked(fresh, tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep_best=2) as checkpoints:
        for step, score in ((1, 0.9), (2, 0.5), (3, 0.8), (4, 0.6), (5, 0.1)):
            checkpoints.save(at(fresh, step), TINY, {}, score)
    assert kept(tmp_path) == [1, 3, 4, 5]


def test_the_best_step_is_found_the_later_of_equals(tmp_path):
    for step, score in ((9, 0.8), (10, 0.9), (2, 0.9), (100, 0.1)):
        fake_step(tmp_path, step, score)
    assert checkpoint.find_step(tmp_path).name == "10"
    assert checkpoint.find_step(tmp_path / "checkpoints" / "2").name == "2"


def test_a_step_that_was_not_finished_is_not_found(tmp_path):
    fake_step(tmp_path, "7.orbax-checkpoint-tmp", 0.99)
    fake_step(tmp_path, "8.orbax-checkpoint-tmp-1700000000", 0.99)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint.*start the same command again"):
        checkpoint.find_step(tmp_path)
    (tmp_path / "checkpoints" / "9").mkdir()
    fake_step(tmp_path, 3, 0.1)
    assert checkpoint.find_step(tmp_path).name == "3"


def test_paths_without_a_checkpoint_say_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist.*expected a run directory"):
        checkpoint.find_step(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        checkpoint.find_step(tmp_path)


# ---- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_steps(fresh, tmp_path_factory):
    """A run directory with the steps 1 (the best) and 2; to be copied."""
    run = tmp_path_factory.mktemp("runs") / "run"
    with checkpoint.Checkpoints(run) as checkpoints:
        for step, score in ((1, 0.9), (2, 0.5)):
            checkpoints.save(at(fresh, step), TINY, {"people": 3}, score)
    return run


@pytest.fixture
def run(two_steps, tmp_path):
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


def files_of(step):
    return sorted(path for path in step.rglob("*") if path.is_file() and path.name != checkpoint.SUMS)


def flip(path):
    """One bit in the middle, which no file system would notice."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_a_step_has_sums_that_another_program_reads(run):
    step = run / "checkpoints" / "2"
    assert subprocess.run(["sha256sum", "--check", "--quiet", checkpoint.SUMS], cwd=step).returncode == 0
    named = {line.split("  ", 1)[1] for line in (step / checkpoint.SUMS).read_text().splitlines()}
    assert named == {str(path.relative_to(step)) for path in files_of(step)}


def test_any_changed_truncated_or_missing_file_is_noticed_and_named(run):
    step = run / "checkpoints" / "2"
    assert checkpoint.damage(step) is None
    files = [path for path in files_of(step) if path.stat().st_size]
    assert len(files) > 20
    for path in files:
        name, whole = str(path.relative_to(step)), path.read_bytes()
        flip(path)
        assert checkpoint.damage(step) == f"{name} ({len(whole):,} bytes) is not what was saved"
        path.write_bytes(whole[:-1])
        assert checkpoint.damage(step) == f"{name} ({len(whole) - 1:,} bytes) is not what was saved"
        path.unlink()
        assert checkpoint.damage(step).startswith(name.split("/")[0])  # the file, or its part that is missing
        path.write_bytes(whole)
    assert checkpoint.damage(step) is None
    shutil.rmtree(step / "params")
    assert checkpoint.damage(step) == "params is missing"


def test_sums_that_are_empty_or_cut_off_are_noticed(run):
    step = run / "checkpoints" / "2"
    sums = step / checkpoint.SUMS
    lines = sums.read_text().splitlines(keepends=True)
    for whole in (0, len(lines) // 2, len(lines) - 1):
        sums.write_text("".join(lines[:whole]))
        assert checkpoint.damage(step).startswith("SHA256SUMS does not name ")
    # What an evaluation does not read does not stop it, nor what a file system leaves behind.
    sums.write_text("".join(line for line in lines if "  train/" not in line))
    assert checkpoint.damage(step, ("params", "data", "config")) is None
    sums.write_text("".join(lines))
    (step / "params" / ".nfs0000001").write_text("")
    assert checkpoint.damage(step) is None


def test_a_step_is_on_the_disk_before_its_sums_say_so(run, monkeypatch):
    step, done = run / "checkpoints" / "2", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.fstat(file).st_ino), fsync(file))[1])
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append(Path(new).name), replace(old, new))[1])
    checkpoint.seal(step)
    before = set(done[: done.index(checkpoint.SUMS)])
    assert {path.stat().st_ino for path in files_of(step)} <= before
    assert {path.stat().st_ino for path in step.rglob("*") if path.is_dir()} <= before
    assert {folder.stat().st_ino for folder in (step, step.parent)} <= set(done[done.index(checkpoint.SUMS) :])


# Orbax leaves futures behind when it fails, which complain when their event loop is gone.
leaves_futures = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.slow
@leaves_futures
def test_orbax_alone_does_not_notice_a_changed_byte(run):
    """Why there are sums. When this fails, Orbax has learned it, and they may go."""
    step = run / "checkpoints" / "2"
    (step / checkpoint.SUMS).unlink()
    unnoticed = 0
    for path in files_of(step / "params" / "ocdbt.process_0" / "d"):
        whole = path.read_bytes()
        for place in np.linspace(0, len(whole) - 1, 8).astype(int):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            unnoticed += checkpoint.damage(step) is None
        path.write_bytes(whole)
    assert unnoticed > 0


def test_evaluation_refuses_a_damaged_step_and_says_what_else_there_is(run):
    step = run / "checkpoints" / "1"
    largest = max(files_of(step / "params"), key=lambda path: path.stat().st_size)
    os.truncate(largest, 100)
    message = (
        rf"(?s){step} is damaged: {largest.relative_to(step)} \(100 bytes\).*another step of it \({step.parent}/2\)"
    )
    with pytest.raises(ValueError, match=message):
        embed.load(run)
    assert embed.load(step.with_name("2")).data["step"] == 2
    # What evaluation does not read does not matter to it.
    flip(max(files_of(step.with_name("2") / "train"), key=lambda path: path.stat().st_size))
    assert embed.load(step.with_name("2")).data["step"] == 2
    (step / "metrics" / "metrics").write_text('{"sco')
    with pytest.raises(ValueError, match=f"{step} is damaged: metrics does not read"):
        checkpoint.find_step(run)


@leaves_futures
def test_without_sums_a_truncated_step_is_noticed_by_reading_it(run):
    step = run / "checkpoints" / "2"
    (step / checkpoint.SUMS).unlink()
    assert checkpoint.damage(step) is None
    for item in ("params", "train", "config", "data", "metrics"):
        copy = Path(shutil.copytree(step, run / f"copy-{item}"))
        needed = [
            path for path in files_of(copy / item) if path.parent.name == "d" or path.name in ("metadata", "metrics")
        ]
        for path in needed:  # others, such as _sharding, are not read
            os.truncate(path, 10)
        assert checkpoint.damage(copy).startswith(f"{item} does not read (")


def test_damaged_steps_are_set_aside_and_whole_ones_get_sums(run, fresh):
    steps_of = run / "checkpoints"
    (steps_of / "1" / checkpoint.SUMS).unlink()  # killed before they were written
    (steps_of / "9").mkdir()  # what a file system may leave of a directory
    flip(max(files_of(steps_of / "2" / "train"), key=lambda path: path.stat().st_size))
    told = checkpoint.set_aside_damaged(run)
    assert [line.split(":")[0] for line in told] == [f"the checkpoint of step {n} is damaged" for n in (2, 9)]
    assert kept(run) == [1]
    assert sorted(path.name for path in (run / "damaged").iterdir()) == ["2", "9"]
    assert (steps_of / "1" / checkpoint.SUMS).exists()
    with checkpoint.Checkpoints(run) as checkpoints:
        assert checkpoints.latest == 1
        assert checkpoint.fingerprint(checkpoints.restore(at(fresh, 0))) == checkpoint.fingerprint(at(fresh, 1))
        checkpoints.save(at(fresh, 2), TINY, {}, 0.5)
    flip(files_of(steps_of / "2" / "params")[0])
    (told,) = checkpoint.set_aside_damaged(run)
    assert told.endswith(f"It is left out, and kept as {run / 'damaged' / '2-again'}.")


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_afresh(run):
    for step in ("1", "2"):
        flip(files_of(run / "checkpoints" / step / "params")[-1])
    with pytest.raises(
        ValueError, match=r"(?s)every checkpoint of .* is damaged:\n  step 1: params/.*\n  step 2: params/"
    ):
        checkpoint.set_aside_damaged(run)
    assert kept(run) == [1, 2]


def test_a_step_without_a_score_is_restored_and_never_the_best(fresh, tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(fresh, 3), TINY, {})
    assert checkpoint.find_step(tmp_path).name == "3", "there is no other"
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(fresh, 4), TINY, {}, 0.0)
        checkpoints.save(at(fresh, 5), TINY, {})
        assert checkpoint.fingerprint(checkpoints.restore(at(fresh, 0))) == checkpoint.fingerprint(at(fresh, 5))
    assert kept(tmp_path) == [4, 5]
    assert checkpoint.find_step(tmp_path).name == "4"


def test_a_save_that_fails_is_told_once_and_the_next_one_works(fresh, tmp_path, monkeypatch):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(fresh, 1), TINY, {}, 0.9)
        checkpoints.wait()
        free = shutil.disk_usage(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: free._replace(free=1000))
            checkpoints.save(at(fresh, 2), TINY, {}, 0.9)
        (told,) = checkpoints.failures()
        assert "the checkpoint of step 2 could not be saved in" in told
        assert "No space left on device (0.0 MB are free there, and it takes about 0." in told
        assert told.endswith("step 1 is the last one saved.")
        assert checkpoints.failures() == []
        with pytest.raises(OSError, match="step 2 could not be saved"):
            checkpoints.wait()
        checkpoints.save(at(fresh, 3), TINY, {}, 0.9)
        checkpoints.wait()
    assert kept(tmp_path) == [1, 3]


def test_what_failed_last_is_told_on_a_line_of_its_own(fresh, tmp_path, monkeypatch, capsys):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        free = shutil.disk_usage(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: free._replace(free=1000))
            checkpoints.save(at(fresh, 1), TINY, {}, 0.9)
        checkpoints.save(at(fresh, 2), TINY, {}, 0.9)
    print("what follows")
    *_, told, after = capsys.readouterr().out.splitlines()
    assert "step 1 could not be saved" in told
    assert after == "what follows"


def begun(run, experiment):
    """A run directory with a first step."""
    report.write_text(run / "config.json", config.to_json(experiment))
    fake_step(run, 1, 0.5)
    (run / "checkpoints" / "1" / "train").mkdir()


def test_every_field_that_differs_is_named(tmp_path):
    begun(tmp_path, TINY)
    other = dataclasses.replace(
        TINY,
        steps=10,
        encoder=config.ConvNet(widths=(4, 16), blocks=(1, 1), dim=8),
        loss=config.Triplet(),
        optimizer=config.AdamW(b2=0.5),
        data=config.Data(source="lfw", margin=1.25, data_dir="/elsewhere"),
        checkpoint=config.Checkpoint(every=3),
    )
    with pytest.raises(ValueError, match="another experiment") as error:
        checkpoint.check_same(tmp_path, other)
    lines = [line.strip() for line in str(error.value).splitlines() if line.startswith("  ")]
    assert lines == [
        "steps: 9 there, 10 now",
        "data.source: 'synthetic' there, 'lfw' now",
        "data.margin: 1.125 there, 1.25 now",
        "encoder.widths: (4, 8) there, (4, 16) now",
        "loss: PairLogistic() there, Triplet(margin=0.2, miner='semi_hard', last_miner=None, last_share=0.25, "
        "tile=None, memory=0, memory_after=0, groups=1) now",
        "optimizer.b2: 0.99 there, 0.5 now",
    ]
    assert str(tmp_path) in str(error.value)
    assert "--run-dir" in str(error.value)


def leaves(value, name=""):
    """Every field of an experiment that holds a plain value: (dotted name, value)."""
    for field in dataclasses.fields(value):
        inner, dotted = getattr(value, field.name), f"{name}{field.name}"
        if dataclasses.is_dataclass(inner):
            yield from leaves(inner, f"{dotted}.")
        else:
            yield dotted, inner


def changed(name, value):
    """Another allowed value of a field."""
    choices = {
        "precision": "float64", "data.source": "lfw", "data.data_dir": "/elsewhere", "preprocess.colour": "bgr",
        "preprocess.flip": "none", "encoder.widths": (4, 9), "encoder.blocks": (1, 2), "augment.flip": False,
        "loss.miner": "all", "loss.last_miner": "hardest", "init": "dlib", "freeze": ("stem*",),
        "layer_rates": ("stem*=0.1",), "preprocess.template": "dlib", "data.exclude": "exclude.txt",
        "loss.tile": 64,
    }  # fmt: skip
    if name in choices:
        return choices[name]
    if name == "data.margin":
        return 1.5
    return value + 1 if isinstance(value, int) else value * 0.5


def replaced(value, name, new):
    head, _, rest = name.partition(".")
    return dataclasses.replace(value, **{head: replaced(getattr(value, head), rest, new) if rest else new})


@pytest.mark.parametrize("loss", [config.PairLogistic(), config.Triplet(), config.ArcFace()])
def test_only_saving_logging_places_and_rounding_may_change(tmp_path, loss):
    experiment = dataclasses.replace(TINY, loss=loss)
    begun(tmp_path, experiment)
    checkpoint.check_same(tmp_path, experiment)
    # What an exclude file names is part of the photos' fingerprint; where it lies is not.
    free = {
        "data.data_dir",
        "data.memory_gb",
        "data.exclude",
        "checkpoint.every",
        "checkpoint.log",
        "checkpoint.keep_best",
    }
    if isinstance(loss, config.Triplet):
        free.add("loss.tile")
    met = set()
    for name, value in leaves(experiment):
        if name == "preprocess.template":  # has one value
            continue
        if name == "batch.accumulate" and not isinstance(loss, config.ArcFace):  # is for such losses alone
            continue
        if name == "loss.memory_after":  # needs a memory
            continue
        other = replaced(experiment, name, changed(name, value))
        assert other != experiment, name
        if name in free:
            met.add(name)
            checkpoint.check_same(tmp_path, other)
        else:
            with pytest.raises(ValueError, match=re.escape(f"\n  {name}: {value!r} there, ")):
                checkpoint.check_same(tmp_path, other)
    assert met == free


@pytest.mark.parametrize("encoder", config.CHOICES["encoder"].values())
def test_microbatches_may_change_where_no_norm_sees_them(tmp_path, encoder):
    experiment = dataclasses.replace(TINY, encoder=encoder, batch=config.Batch(microbatches=2))
    begun(tmp_path, experiment)
    module = embed.build_encoder(experiment)
    images = jnp.zeros((1, 112, 112, 3))
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), images, train=False))
    other = replaced(experiment, "batch.microbatches", 4)
    if "batch_stats" not in variables:
        checkpoint.check_same(tmp_path, other)
    else:
        with pytest.raises(ValueError, match="batch.microbatches: 2 there, 4 now"):
            checkpoint.check_same(tmp_path, other)


def test_before_the_first_step_is_saved_anything_may_change(tmp_path):
    other = dataclasses.replace(TINY, steps=10)
    checkpoint.check_same(tmp_path / "nowhere", other)
    report.write_text(tmp_path / "config.json", config.to_json(TINY))
    fake_step(tmp_path, "1.orbax-checkpoint-tmp", 0.5)
    checkpoint.check_same(tmp_path, other)
    (fake_step(tmp_path, 1, 0.5) / "train").mkdir()
    with pytest.raises(ValueError, match="steps: 9 there, 10 now"):
        checkpoint.check_same(tmp_path, other)


def test_without_config_json_the_newest_step_says_what_was_trained(run):
    assert not (run / "config.json").exists()
    checkpoint.check_same(run, TINY)
    with pytest.raises(ValueError, match="steps: 9 there, 10 now"):
        checkpoint.check_same(run, dataclasses.replace(TINY, steps=10))


def test_other_photos_than_those_of_the_newest_step_are_refused(fresh, tmp_path):
    facts = {"source": "lfw", "people": 1200, "photos": 5000}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(fresh, 1), TINY, {**facts, "fingerprint": "older"}, 0.9)
        checkpoints.save(at(fresh, 2), TINY, {**facts, "fingerprint": "newer"}, 0.5)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.check_data({**facts, "fingerprint": "newer"}, tmp_path)
        with pytest.raises(ValueError, match="lfw is not what .*1,200 training people.*5,000 photos there, 7 with"):
            checkpoints.check_data({**facts, "people": 7, "fingerprint": "older"}, tmp_path)


def test_a_run_directory_has_one_owner_and_a_kill_frees_it(tmp_path):
    run = tmp_path / "runs" / "one"
    with child(HOLDER, run) as holder:
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):  # the refused one must not take the owner's name away
            with (
                pytest.raises(BlockingIOError, match=f"{run} is being trained by process {holder.pid} on {HOST}\\."),
                checkpoint.locked(run),
            ):
                pass
        os.kill(holder.pid, signal.SIGKILL)
        assert holder.wait(timeout=30) == -signal.SIGKILL
    # The new owner's number alone, not after the old one's.
    message = f"process {os.getpid()} on {HOST}\\."
    with checkpoint.locked(run), pytest.raises(BlockingIOError, match=message), checkpoint.locked(run):
        pass
    with checkpoint.locked(run), checkpoint.locked(tmp_path / "runs" / "two"):
        pass


def test_a_holder_that_ends_while_another_asks_was_not_killed(tmp_path, monkeypatch, capsys):
    (tmp_path / "lock").write_text(f"7 on {socket.gethostname()}")
    flock = fcntl.flock

    def ends(file, how):
        os.truncate(tmp_path / "lock", 0)  # as it does at its end, before the lock is free
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", ends)
    with checkpoint.locked(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()} on {socket.gethostname()}"
    assert capsys.readouterr().out == ""


def test_a_file_system_without_locks_says_what_to_do(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with (
        pytest.raises(OSError, match=rf"{tmp_path} cannot be locked \(Operation not supported\): .*another disk"),
        checkpoint.locked(tmp_path),
    ):
        pass


def test_a_full_disk_takes_no_name_and_the_lock_holds(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with (
            checkpoint.locked(tmp_path),
            pytest.raises(BlockingIOError, match="trained by process unknown"),
            checkpoint.locked(tmp_path),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    report.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        report.write_text(path, "new" * 10_000 + "\ud800")  # no file can hold half a surrogate pair
    assert path.read_text() == "old"

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            report.write_text(path, "new")
    assert path.read_text() == "old"
    report.write_text(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_reader_sees_the_old_file_or_the_new_never_a_part(tmp_path):
    path = tmp_path / "metrics.json"
    texts = ["a" * 300_000, "b" * 300_000]
    report.write_text(path, texts[0])
    seen = set()
    with child(WRITER, path) as process:
        assert process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            text = path.read_text()
            assert text in texts, f"{len(text)} characters"
            seen.add(text[0])
        assert process.wait(timeout=30) == 0
    assert seen == {"a", "b"}


def test_a_fingerprint_changes_with_names_shapes_types_and_bits():
    numbers = np.arange(6, dtype=np.float32)
    zero = np.zeros((), np.int32)
    tree = {"a": numbers, "b": {"c": zero}}
    same = {"b": {"c": jnp.zeros((), jnp.int32)}, "a": jnp.arange(6, dtype=jnp.float32)}
    print_of = checkpoint.fingerprint(tree)
    assert checkpoint.fingerprint(same) == print_of
    next_float = numbers.copy()
    next_float[3] = np.nextafter(numbers[3], np.float32(9))
    others = [
        {**tree, "a": next_float},
        {**tree, "a": numbers.reshape(2, 3)},
        {**tree, "a": numbers.view(np.int32)},
        {"x": numbers, "b": {"c": zero}},
        {"a": numbers, "b": {"d": zero}},
        {**tree, "b": {"c": np.float32(-0.0)}},
    ]
    prints = {checkpoint.fingerprint(other) for other in others} | {print_of}
    assert len(prints) == len(others) + 1

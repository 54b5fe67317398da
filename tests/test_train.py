"""Training as it is used: real processes, a real kill, and what is left behind afterwards."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from faceembed import checkpoint
from tests.conftest import save_photos, xla_flags

ROOT = Path(__file__).parents[1]
STEPS = 16
TINY = (
    "quickstart", "--preprocess.size", "32", "--encoder.widths", "4", "8", "--encoder.blocks", "1", "1",
    "--encoder.dim", "16", "--batch.people", "8", "--steps", str(STEPS), "--checkpoint.every", "4", "--checkpoint.log", "3",
    "--no-progress",
)  # fmt: skip
DATA = []
"""Flags that name the photos."""


@pytest.fixture(scope="module", autouse=True)
def data(faces):
    DATA[:] = faces


def environment(devices=1):
    return {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices), "PYTHONUNBUFFERED": "1",
        # A second process like the first does not compile again.
        "JAX_COMPILATION_CACHE_DIR": os.environ["FACEEMBED_TEST_CACHE"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip


def start(run, *more, devices=1, **variables):
    command = [sys.executable, "launch.py", "train", *TINY, *DATA, "--run-dir", str(run), *more]
    return subprocess.Popen(
        command, cwd=ROOT, env={**environment(devices), **variables}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for(process, path):
    """Until a file is there; fails at once if the process ends before."""
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted, and what it printed: also each function that JAX compiled."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    return run, finish(start(run, "--profile", "10:11", JAX_LOG_COMPILES="1"))


def state_of(run, step):
    """Every array of a checkpoint, the optimizer's included, as NumPy arrays by name."""
    import jax
    import orbax.checkpoint as ocp

    arrays = {}
    for item in ("params", "train"):
        handler = ocp.PyTreeCheckpointHandler()
        folder = run / "checkpoints" / str(step) / item
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(folder).tree)
        restored = handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        arrays |= {
            item + jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(restored)
        }
        handler.close()
    return arrays


def metrics_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("images_per_s", "host_memory_gb")
    return [{name: value for name, value in row.items() if name not in clock} for row in rows]


def page_of(run):
    """report.html without what depends on time, memory and place."""
    text = (run / "report.html").read_text()
    text = re.sub(r'<figure id="figure-(images-per-s|memory)".*?</figure>', "", text, flags=re.DOTALL)
    text = re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)  # commands, which name the folder
    return text.replace(str(run), "RUN").replace(run.name, "NAME")


def test_a_run_learns_and_leaves_what_it_promises(whole):
    run, printed = whole
    rows = metrics_of(run)
    # Every third step, and where a save ends a row.
    assert [row["step"] for row in rows if "loss" in row] == [3, 4, 6, 8, 9, 12, 15, 16]
    assert [row["step"] for row in rows if "select_auc" in row] == [4, 8, 12, 16]
    for row in rows:
        if "loss" in row:
            assert {"active", "d_ap_q50", "d_an_q50", "grad_norm", "learning_rate", "effective_rank"} <= set(row)
            assert row["skipped"] == 0
            # The groups' norms are of one gradient; a row holds their means over three updates.
            groups = [value for name, value in row.items() if name.startswith("grad_norm/")]
            assert len(groups) == 4
            assert max(groups) <= row["grad_norm"] <= sum(groups)
            # What other miners would find is measured for every third update.
            assert (row["active_hardest"] is None) == (row["step"] % 3 > 0)
    results = json.loads((run / "results.json").read_text())["results"]
    assert list(results["heads"]) == ["threshold", "logistic_distance", "logistic_abs"]
    # What is printed is what is written.
    accuracy = results["heads"]["logistic_distance"]["accuracy"]
    assert f"logistic_distance  {100 * accuracy:.2f} %" in printed
    # Tested people were in no training pair, of the encoder or of a head.
    assert results["warnings"] == []
    assert "report people" in printed
    assert f"report: {run / 'report.html'}" in printed
    assert (run / "events.jsonl").exists()
    assert list((run / "tensorboard").iterdir())


def test_a_run_compiles_its_update_once(whole):
    compiled = [line for line in whole[1].splitlines() if "Finished XLA compilation of jit(update)" in line]
    assert len(compiled) == 1
    # Select people are embedded at every save, in batches of one size, the last one padded.
    embeds = [line for line in whole[1].splitlines() if "Finished XLA compilation of jit(embed)" in line]
    assert len(embeds) <= 4, embeds  # select, calibrate and report people of another count, and no more


def test_a_profile_of_some_updates_is_left_in_the_run_directory(whole):
    run, printed = whole
    assert f"profile of updates 10 to 11: {run / 'profile'}" in printed
    (trace,) = run.glob("profile/**/*.xplane.pb")
    assert b"update" in trace.read_bytes()


@pytest.mark.slow
def test_a_training_that_is_never_finite_stops_and_names_the_last_good_checkpoint(tmp_path):
    run = tmp_path / "run"
    wild = ("--schedule.learning-rate", "1e30", "--schedule.warmup", "0", "--schedule.clip-norm", "1e30")
    process = start(run, *wild, "--skip-bad-steps", "5")
    told = process.communicate(timeout=240)[0]
    assert process.returncode == 1, told
    assert "Traceback" not in told
    # The length of such a step overflows, so none is ever made.
    assert "step 1: not finite: the optimizer’s step, in 3 of 3 updates" in told
    assert "more than --skip-bad-steps 5. The last good checkpoint is that of step 4." in told
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(event["step"], event["kind"]) for event in events] == [(1, "non-finite")]
    for name, array in state_of(run, 4).items():
        assert np.isfinite(array).all(), name
    # Going on with the same limit would change nothing, and says so rather than train for ever.
    again = start(run, *wild, "--skip-bad-steps", "5").communicate(timeout=240)[0]
    assert "more than --skip-bad-steps 5" in again


@pytest.mark.parametrize("value", ["100:110", "3", "8:4", "0:2", "a:b"])
def test_a_profile_of_updates_that_are_not_is_refused(tmp_path, value):
    process = start(tmp_path / "run", "--profile", value)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert f"--profile is '{value}': expected the first and the last update, 1 to 16" in told
    assert not (tmp_path / "run").exists()


def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(whole, tmp_path):
    run = tmp_path / "killed"
    process = start(run)
    wait_for(process, run / "checkpoints" / "8" / "_CHECKPOINT_METADATA")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (run / "results.json").exists(), "the kill came too late to mean anything"
    (run / "profile").touch()  # where a folder is to be made; and a profile is not worth a training
    printed = finish(start(run, "--profile", "15:15"))
    assert "going on from step" in printed
    assert "profile of updates 15 to 15: not written, and the training goes on: " in printed
    assert "is not a directory" in printed
    expected, got = state_of(whole[0], STEPS), state_of(run, STEPS)
    assert expected.keys() == got.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    assert sum("opt_state" in name for name in expected) > 10
    # The log reads as if nothing had happened, and so do the table and the page, but for clocks and paths.
    assert page_of(run) == page_of(whole[0])
    assert metrics_of(run) == metrics_of(whole[0])
    first, second = (json.loads((folder / "results.json").read_text())["results"] for folder in (whole[0], run))
    assert first == second
    assert not list(run.glob("checkpoints/*tmp*"))


def test_a_second_launch_on_a_live_run_directory_is_refused(tmp_path):
    run = tmp_path / "live"
    process = start(run, "--steps", "100000")
    try:
        wait_for(process, run / "metrics.jsonl")
        second = start(run, "--steps", "100000")
        told = second.communicate(timeout=120)[0]
        assert second.returncode == 1
        assert f"is being trained by process {process.pid}" in told
        assert "--run-dir" in told
        assert process.poll() is None, "the first run must go on"
    finally:
        process.kill()
        process.communicate()


def test_another_experiment_in_the_run_directory_is_refused(whole):
    process = start(whole[0], "--loss.margin", "0.3", "--checkpoint.log", "4")
    told = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert "loss.margin: 0.2 there, 0.3 now" in told
    assert "Traceback" not in told
    assert "checkpoint.log" not in told  # how often to log may change


def test_other_photos_in_the_run_directory_are_refused(whole, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(whole[0], copy)
    data = next((copy / "checkpoints" / str(STEPS) / "data").glob("metadata"))
    facts = json.loads(data.read_text())
    data.write_text(json.dumps({**facts, "fingerprint": "0" * 64}))
    checkpoint.seal(copy / "checkpoints" / str(STEPS))  # or it would be taken for a damaged one
    process = start(copy)
    told = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert "is not what" in told
    assert "Traceback" not in told


def test_a_failed_start_leaves_the_run_directory_free(tmp_path):
    run = tmp_path / "run"
    process = start(run, "--data.source", f"folder:{tmp_path / 'nowhere'}")
    told = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert "nowhere" in told
    assert "Traceback" not in told
    assert not (run / "config.json").exists()


@pytest.mark.slow  # tests/test_reliability.py does it in one process, on 8, 4 and 1
def test_eight_devices_save_and_one_goes_on(whole, tmp_path):
    run = tmp_path / "elastic"
    process = start(run, "--shard-optimizer", devices=8)
    wait_for(process, run / "checkpoints" / "8" / "_CHECKPOINT_METADATA")
    process.kill()
    process.communicate()
    printed = finish(start(run, "--deterministic", devices=1))
    assert "devices 8 → 1" in printed
    assert json.loads((run / "environment.json").read_text())["deterministic"] is True
    expected, got = state_of(whole[0], STEPS), state_of(run, STEPS)
    for name in ("params", "train"):
        a, b = (
            np.concatenate(
                [np.ravel(x).astype(np.float64) for key, x in sorted(arrays.items()) if key.startswith(name)]
            )
            for arrays in (got, expected)
        )
        assert 0 < np.linalg.norm(a - b) / np.linalg.norm(b) < 1e-3


@pytest.mark.slow
def test_a_run_that_started_from_another_goes_on_after_that_one_is_gone(whole, tmp_path):
    """The first network's people and facts are in the checkpoint: nothing is asked of the first network again."""
    origin, run = tmp_path / "origin", tmp_path / "run"
    shutil.copytree(whole[0], origin)
    change = ("--init", str(origin), "--encoder.dim", "12", "--freeze", "stem*", "--steps", "8",
              "--checkpoint.keep-best", "2")  # fmt: skip
    output = finish(start(run, *change))
    assert f"starts from {origin}" in output
    assert re.search(r"afresh: embedding/kernel \[\d+, 12\], there \[\d+, 16\]", output)
    first, started = (state_of(part, step) for part, step in ((origin, STEPS), (run, 8)))
    kept = [name for name in first if name.startswith("params['ema']['params']['stem")]
    assert len(kept) > 2
    for name in kept:
        np.testing.assert_allclose(first[name], started[name], rtol=1e-5)
    expected = json.loads((run / "results.json").read_text())["results"]
    shutil.rmtree(run / "checkpoints" / "8")
    for gone in ("results.json", "report.html", "policy.json"):
        (run / gone).unlink()
    shutil.rmtree(origin)
    assert "going on from step 4 of 8" in finish(start(run, *change))
    assert json.loads((run / "results.json").read_text())["results"] == expected


def test_a_folder_of_photos_is_trained_on_whatever_lies_in_it(tmp_path, pictures):
    """From files through grain, with the other losses' and optimizers' path; a broken file is named and left out."""
    save_photos(tmp_path / "photos", pictures[:, :3], "p{}/{}.png")
    broken = tmp_path / "photos" / "p7" / "1.png"
    broken.write_bytes(broken.read_bytes()[:500])
    more = ("--data.source", f"folder:{tmp_path / 'photos'}", "--data.data-dir", str(tmp_path / "data"))
    more += ("--data.memory-gb", "0", "--loss", "contrastive", "--optimizer", "sgd", "--steps", "4")
    printed = finish(start(tmp_path / "run", *more))
    assert "p7/1.png" in printed
    assert "verification of" in printed
    losses = [row["loss"] for row in metrics_of(tmp_path / "run") if "loss" in row]
    assert min(losses) > 0


def test_of_select_people_only_the_photos_in_pairs_are_kept_in_memory(noise_photos):
    from faceembed.data import pairs
    from faceembed.preprocess import Preprocess
    from faceembed.training import loop

    select = loop._Select.read(noise_photos, Preprocess(size=16), progress=False)
    chosen = pairs.heldout(noise_photos, "select")
    assert len(select.crops) == pairs.used(chosen, noise_photos).sum() < len(noise_photos)
    place = {str(key): index for index, key in enumerate(noise_photos.keys)}
    for keys, rows in ((chosen.key_a, select.first), (chosen.key_b, select.second)):
        expected = np.stack([noise_photos.read(place[str(key)]) for key in keys])
        np.testing.assert_array_equal(select.crops[rows], expected)


def insightfaces(folder, pictures):
    """A .rec of 120 people with three photos each."""
    import io

    from PIL import Image
    from recordio_writer import write_set

    people = []
    for person in pictures[:, :3]:
        files = [io.BytesIO() for _ in person]
        for file, pixels in zip(files, person, strict=True):
            Image.fromarray(pixels).save(file, "JPEG", quality=90)
        people.append([file.getvalue() for file in files])
    return write_set(folder / "set" / "train.rec", people)


@pytest.mark.slow
def test_insightfaces_rec_is_trained_on_as_it_is(tmp_path, pictures):
    """Read as it is used, never whole; and the set that it is converted to has the same people in the same halves."""
    from faceembed.data import builders, sources, splits

    rec = insightfaces(tmp_path, pictures)
    (tmp_path / "set" / "property").write_text("120,36,36\n")
    more = ("--data.source", f"insightface:{rec}", "--data.data-dir", str(tmp_path / "data"), "--data.memory-gb", "0")
    printed = finish(start(tmp_path / "run", *more, "--preprocess.template", "arcface", "--steps", "4"))
    assert "verification of" in printed
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    losses = [row["loss"] for row in metrics_of(tmp_path / "run") if "loss" in row]
    assert min(losses) > 0
    assert "no names" not in json.dumps(results)

    builders.prepare("insightface", archives=[rec], data_dir=tmp_path / "data", progress=False)
    options = {"data_dir": tmp_path / "data", "progress": False}
    here, there = (sources.open_source(source, **options) for source in (f"insightface:{rec}", "prepared:set"))
    np.testing.assert_array_equal(splits.split_of(here.people), splits.split_of(there.people))


def test_photos_of_held_out_people_that_do_not_decode_are_named_and_left_out_of_what_is_compared(tmp_path, pictures):
    """The file's records are spoilt in place: of a set of another size all people would be others."""
    from faceembed import evaluate
    from faceembed.data import recordio, sources

    rec = insightfaces(tmp_path, pictures)
    source, data_dir = f"insightface:{rec}", tmp_path / "data"
    people_of = evaluate.split_photos(sources.open_source(source, data_dir=data_dir, progress=False))
    spoilt = {part: str(photos.keys[4]) for part, photos in people_of.items()}
    _, offset = recordio.read_index(rec.with_suffix(".idx"), rec.stat().st_size)
    with open(rec, "r+b") as file:
        for key in spoilt.values():
            file.seek(offset[int(key.partition("/")[2])] + 32)  # after the heads of the record and of its photo
            file.write(bytes(100))
    held_out = [spoilt[part] for part in ("select", "calibrate", "report")]

    more = (
        "--data.source", source, "--data.data-dir", str(data_dir), "--preprocess.template", "arcface", "--steps", "4",
    )  # fmt: skip
    printed = finish(start(run := tmp_path / "run", *more))
    told, trained = (
        printed.index(text) for text in ("photos of held-out people that do not decode", "first step done")
    )
    assert told < trained, "and not days later"
    for key in held_out:
        assert f"\n  {source}: photo {key}, the record at byte " in printed
    results = json.loads((run / "results.json").read_text())
    assert results["left_out_photos"] == held_out
    assert results["bad_photos"] == [spoilt["train"]]
    assert (
        f"3 photos of held-out people do not decode and are left out of what is compared: {', '.join(held_out)}"
        in (run / "report.html").read_text()
    )

    people_of = evaluate.split_photos(sources.open_source(source, data_dir=data_dir, progress=False))
    with pytest.raises(
        ValueError, match=rf"(?s)3 photos of {source}, of people .*--skip-bad-photos 2:.*{'.*'.join(held_out)}"
    ):
        evaluate.leave_out_bad(people_of, 2, progress=False)
    tested, left_out = evaluate.leave_out_bad(people_of, 3, progress=False)
    assert left_out == held_out
    for part, photos in tested.items():
        expected = [key for key in people_of[part].keys.tolist() if key not in held_out]
        assert photos.keys.tolist() == expected


# ---- the checkpoint in use ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedder(whole):
    import faceembed as fe

    return fe.load(whole[0])


def test_embeddings_do_not_depend_on_company_and_are_flip_invariant(embedder):
    photos = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    emb = embedder(photos)
    np.testing.assert_allclose(np.linalg.norm(emb, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(embedder(photos[3:4])[0], emb[3], atol=1e-5)
    np.testing.assert_allclose(embedder(photos, batch=2), emb, atol=1e-5)
    np.testing.assert_allclose(embedder(photos[:, :, ::-1]), emb, atol=1e-5)
    assert np.abs(emb[0] - emb[1]).max() > 1e-3


def test_evaluation_uses_the_moving_averages(whole, embedder):
    arrays = state_of(whole[0], int(embedder.path.name))
    kernel = embedder.variables["params"]["stem_conv"]["kernel"]
    np.testing.assert_array_equal(kernel, arrays["params['ema']['params']['stem_conv']['kernel']"])
    assert np.abs(kernel - arrays["params['params']['stem_conv']['kernel']"]).max() > 0


def test_a_mismatched_pipeline_is_refused(embedder, tmp_path):
    photos = np.zeros((2, 32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="float32: expected uint8"):
        embedder(photos.astype(np.float32))
    with pytest.raises(ValueError, match=r"takes \[n, 32, 32, 3\]"):
        embedder(np.zeros((2, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="no images"):
        embedder(photos[:0])
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff nothing more")
    with pytest.raises(ValueError, match=r"broken\.jpg is no whole image"):
        embedder.read([broken])
    with pytest.raises(ValueError, match="framing 'lwf'"):
        embedder.read([np.zeros((50, 50, 3), np.uint8)], framing="lwf")


def test_a_policy_belongs_to_its_parameters(whole, embedder, tmp_path):
    import shutil

    import faceembed as fe

    assert embedder.head("logistic_distance").calibrated
    copy = tmp_path / "copy"
    shutil.copytree(whole[0], copy)
    policy = json.loads((copy / "policy.json").read_text())
    policy["fingerprint"] = "0" * 64
    (copy / "policy.json").write_text(json.dumps(policy))
    other = fe.load(copy)
    with pytest.raises(ValueError, match=r"no policy\.json for its parameters"):
        other.head()


@pytest.mark.parametrize(("path", "message"), [("nowhere", "does not exist"), (".", "holds no complete checkpoint")])
def test_loading_what_is_no_checkpoint(tmp_path, path, message):
    import faceembed as fe

    with pytest.raises(FileNotFoundError, match=message):
        fe.load(tmp_path / path)


def test_verify_and_embed_by_command(whole, tmp_path, pictures):
    def launch(*arguments):
        done = subprocess.run(
            [sys.executable, "launch.py", *arguments], cwd=ROOT, env=environment(), text=True, capture_output=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    save_photos(tmp_path / "photos", pictures[:8, :3], "person{}/{}.png")
    out = tmp_path / "faces.npz"
    data_dir = ("--data-dir", str(tmp_path / "data"))
    told = launch(
        "embed", str(whole[0]), f"folder:{tmp_path / 'photos'}", "--out", str(out), "--no-progress", *data_dir
    )
    assert "24 embeddings of 16 numbers, 8 people" in told
    with np.load(out) as saved:
        assert saved["embedding"].shape == (24, 16)
        np.testing.assert_array_equal(saved["identity"], np.repeat(np.arange(8), 3))
        by_command = saved["embedding"]

    lines = ["a,b,same,fold"]
    rows = []
    for fold in range(4):
        for who in (2 * fold, 2 * fold + 1):
            rows += [(3 * who, 3 * who + 1, 1, fold), (3 * who, 3 * who + 2, 1, fold)]
            other = 2 * fold + (who + 1) % 2
            rows += [(3 * who, 3 * other + 1, 0, fold), (3 * who + 1, 3 * other + 2, 0, fold)]
    name = lambda index: f"photos/person{index // 3}/{index % 3}.png"  # noqa: E731
    lines += [f"{name(a)},{name(b)},{same},{fold}" for a, b, same, fold in rows]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    told = launch("verify", str(whole[0]), "--pairs", f"csv:{tmp_path / 'pairs.csv'}", "--out", str(tmp_path / "out"),
                  "--no-progress", *data_dir)  # fmt: skip
    assert "csv:" in (tmp_path / "out" / "report.html").read_text()
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    # The same figures from the saved embeddings, through the library.
    import faceembed as fe

    a, b, same, fold = (np.array(column) for column in zip(*rows, strict=True))
    again = fe.verify.compare(by_command[a], by_command[b], same.astype(bool), a // 3, b // 3, folds=fold)
    for head in again:
        assert results["heads"][head]["accuracy"] == pytest.approx(again[head].accuracy, abs=1e-9)
        assert results["heads"][head]["auc"] == pytest.approx(again[head].auc, abs=1e-4)


def test_verify_warns_of_training_people(whole, embedder):
    from faceembed import evaluate

    names = np.array([f"stranger{i}" for i in range(5)])
    assert evaluate.training_people(embedder, names) == []
    from faceembed.data import sources, splits

    photos = sources.open_source("synthetic", people=120, photos=4, seed=0, size=36)
    part = splits.split_of(photos.people)
    known = evaluate.training_people(embedder, photos.people)
    assert known == photos.people[part == "train"].tolist()


def test_the_readmes_script_runs_as_written(whole, tmp_path, pictures):
    from PIL import Image

    text = (ROOT / "README.md").read_text()
    script = text.split("## Use a checkpoint")[1].split("```python\n")[1].split("```")[0]
    assert len([line for line in script.splitlines() if line]) <= 10
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "celeba").symlink_to(whole[0])
    for name, pixels in zip(("one.jpg", "other.jpg"), pictures[5, :2], strict=True):
        Image.fromarray(pixels).save(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    distance, verdict = done.stdout.splitlines()
    assert distance.startswith("squared distance ")
    assert verdict in ("same person", "different people")


def test_inner_layers_are_the_encoders_and_not_negative(embedder):
    images = np.random.default_rng(0).integers(0, 256, (5, embedder.size, embedder.size, 3)).astype(np.uint8)
    block = next(name for name in embedder.layer_names if name.startswith("stage2"))
    found = embedder.layers(images, ["features", block], batch=2)
    from faceembed import embed
    from faceembed.preprocess import normalize

    encoder = embed.build_encoder(embedder.config)
    both = normalize(embedder.preprocess, np.concatenate([images, images[:, :, ::-1]]))
    expected, state = encoder.apply(
        embedder.variables, both, train=False, method="features", capture_intermediates=True, mutable=["intermediates"]
    )
    expected = np.asarray(expected).reshape(2, 5, -1).mean(axis=0)
    np.testing.assert_allclose(found["features"], expected, atol=1e-5)
    inner = np.maximum(np.asarray(state["intermediates"][block]["__call__"][0]), 0).mean(axis=(1, 2))
    np.testing.assert_allclose(found[block], inner.reshape(2, 5, -1).mean(axis=0), atol=1e-5)
    assert all((value >= 0).all() and value.any() for value in found.values())
    with pytest.raises(ValueError, match="no layer 'stage9'; it has features, "):
        embedder.layers(images, ["stage9"])
    with pytest.raises(ValueError, match="expected uint8"):
        embedder.layers(images / 255, ["features"])


@pytest.fixture(scope="module")
def with_points(embedder):
    """The checkpoint with a policy of enough people: its own has four calibrate people, who resolve no rate."""
    from faceembed import evaluate
    from faceembed.data import sources

    assert embedder.policy["operating_points"] == {name: [] for name in embedder.policy["heads"]}
    assert embedder.policy["identification"] == {"people": 4, "cuts": []}
    photos = sources.open_source("synthetic", people=40, photos=3, seed=9, size=36)
    heads = {name: embedder.head(name) for name in embedder.policy["heads"]}
    found = evaluate.compare_photos(embedder, photos, heads, fmrs=evaluate.POLICY_FMRS, progress=False, draws=50)
    points = {name: evaluate._operating_points(found, name) for name in heads}
    return dataclasses.replace(embedder, policy=embedder.policy | {"operating_points": points})


def test_same_person_at_a_rate_that_people_resolve(with_points):
    embedder = with_points
    points = embedder.policy["operating_points"]["logistic_distance"]
    assert [p["fmr"] for p in points] == [0.1, 0.01, 0.001][: len(points)]
    assert len(points) >= 2
    fmr = points[0]["fmr"]
    assert all(p["impostor_pairs"] * p["fmr"] >= 10 for p in points)
    assert all(p["threshold_interval"][0] <= p["threshold"] <= p["threshold_interval"][1] for p in points)
    images = np.random.default_rng(0).integers(0, 256, (6, embedder.size, embedder.size, 3)).astype(np.uint8)
    emb = embedder(images)
    found = embedder.same(emb[:3], emb[3:], fmr=fmr)
    head = embedder.head("logistic_distance")
    np.testing.assert_array_equal(found, head.score(emb[:3], emb[3:]) >= points[0]["threshold"])
    np.testing.assert_array_equal(embedder.same(images[:3], images[3:], fmr=fmr), found)
    assert embedder.same(images[0], images[0], fmr=fmr) == True  # noqa: E712  (a bool, not an array)
    assert embedder.same(emb[0], emb[0], fmr=fmr, head="threshold")
    with pytest.raises(ValueError, match=r"no threshold of logistic_distance for an FMR of 1e-09; it has them for"):
        embedder.same(emb[0], emb[1], fmr=1e-9)


def test_the_final_report_compares_all_pairs_of_report_people(whole):
    from faceembed.data import sources, splits

    photos = sources.open_source("synthetic", people=120, photos=4, seed=0, size=36)
    everyone = json.loads((whole[0] / "results.json").read_text())["all_pairs"]
    assert everyone["n_people"] == (splits.split_of(photos.people) == "report").sum()
    assert "every pair of" in whole[1]

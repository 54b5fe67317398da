"""What a run writes down: read back from the files, after interruptions too."""

import json
import os
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from faceembed.training import logs

ROOT = Path(__file__).parents[1]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tensorboard(run):
    """The events in the files of a run, in the order they were written: what TensorBoard reads."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted((run / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            # A TFRecord: length, its checksum, the message, its checksum.
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def scalars(run):
    """(step, name) → value, as TensorBoard shows them: what a START event purges is forgotten."""
    found = {}
    for event in tensorboard(run):
        if event.session_log.status == event.session_log.START:
            found = {key: value for key, value in found.items() if key[0] < event.step}
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found[event.step, value.tag] = value.simple_value
    return found


def opened(run, first=0, **more):
    return logs.open_logs(run, first, config={"steps": 9}, **more)


def test_what_is_written_is_read_back(tmp_path):
    with opened(tmp_path) as log:
        log.write(10, {"loss": np.float32(0.5), "grad_norm/stem": 2, "bad": float("nan"), "worse": np.float64("-inf")})
        log.write(10, {"select_auc": 0.75})
        log.event(10, "collapse", "all embeddings are one → try <this>")
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 10, "loss": 0.5, "grad_norm/stem": 2.0, "bad": None, "worse": None},
        {"step": 10, "select_auc": 0.75},
    ]
    assert lines(tmp_path / "events.jsonl") == [
        {"step": 10, "kind": "collapse", "message": "all embeddings are one → try <this>"}
    ]
    shown = scalars(tmp_path)
    assert np.isnan(shown.pop((10, "bad")))
    assert shown == {(10, "loss"): 0.5, (10, "grad_norm/stem"): 2, (10, "worse"): -np.inf, (10, "select_auc"): 0.75}
    (text,) = [value for event in tensorboard(tmp_path) for value in event.summary.value if "event" in value.tag]
    assert text.tag.startswith("event/collapse")
    assert text.tensor.string_val[0].decode() == "all embeddings are one → try <this>"


def test_lines_are_on_the_disk_before_the_log_is_closed(tmp_path):
    log = opened(tmp_path)
    log.write(1, {"loss": 1.0})
    log.event(1, "starvation", "…")
    assert len(lines(tmp_path / "metrics.jsonl")) == len(lines(tmp_path / "events.jsonl")) == 1
    log.close()
    log.close()  # harmless


def test_a_resumed_run_reads_as_if_nothing_had_happened(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"

    def steps(log, first, last):
        for step in range(first, last + 1):
            log.write(step, {"loss": 1 / step})
        log.event(last, "collapse", f"noticed at {last}")

    with opened(whole) as log:
        steps(log, 1, 4)
        steps(log, 5, 9)
    with opened(resumed) as log:
        steps(log, 1, 4)
        steps(log, 5, 7)  # lost: the checkpoint is of step 4
    with open(resumed / "metrics.jsonl", "ab") as file:
        file.write('{"step": 3, "lo\u2192'.encode()[:-1])  # a kill, in the middle of a letter
    with opened(resumed, 4) as log:
        steps(log, 5, 9)
    for name in ("metrics.jsonl", "events.jsonl"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    assert scalars(resumed) == scalars(whole)
    assert len(scalars(whole)) == 9
    # A start from nothing, where a command died before its first checkpoint.
    with opened(resumed) as log:
        steps(log, 1, 1)
    assert scalars(resumed) == {(1, "loss"): 1.0}
    assert len(lines(resumed / "metrics.jsonl")) == 1


def test_dropping_lines_is_atomic(tmp_path, monkeypatch):
    with opened(tmp_path) as log:
        log.write(1, {"loss": 1.0})
        log.write(2, {"loss": 2.0})
    before = (tmp_path / "metrics.jsonl").read_text()

    def crash(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="no space"):
        opened(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_what_a_full_disk_does_not_take_is_written_later_in_order_and_whole(tmp_path, monkeypatch, capsys):
    """The real full disk is in test_reliability.py; here one that takes a few bytes of a line."""
    real, room = open, 10**6

    class Small:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            nonlocal room
            if not room:
                raise OSError(28, "No space left on device")
            written = self.file.write(data[:room])
            room -= written
            return written

    monkeypatch.setattr(logs, "open", lambda *args, **more: Small(real(*args, **more)), raising=False)
    with opened(tmp_path) as log:
        log.write(1, {"loss": 1.0})
        room = 7
        for step in (2, 3):
            log.write(step, {"loss": float(step)})
        text = (tmp_path / "metrics.jsonl").read_text()
        assert text.splitlines()[-1] == '{"step"'
        room = 10**6
        log.write(4, {"loss": 4.0})
        log.event(4, "collapse", "…")
        assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert scalars(tmp_path) == {(step, "loss"): float(step) for step in (1, 2, 3, 4)}
    told = capsys.readouterr().out
    assert told.count("metrics.jsonl cannot be written (No space left on device") == 1
    assert "metrics.jsonl is written again; nothing is missing in it." in told
    with opened(tmp_path, 4) as log:
        room = 0
        log.write(5, {"loss": 5.0})
    assert "metrics.jsonl lacks its last 25 bytes: they could not be written." in capsys.readouterr().out


def test_events_that_are_not_over_are_ongoing_after_a_resume(tmp_path):
    with opened(tmp_path) as log:
        assert log.ongoing == ()
        for step, kind in ((1, "collapse"), (2, "starvation"), (3, "collapse over"), (5, "starvation over")):
            log.event(step, kind, "…")
    with opened(tmp_path, 4) as log:  # the end of the starvation is of a step that comes again
        assert log.ongoing == ("starvation",)
    with opened(tmp_path, 2) as log:
        assert log.ongoing == ("collapse", "starvation")


def test_a_failure_closes_every_log_and_is_not_hidden(tmp_path):
    def diverge():
        with opened(tmp_path) as log:
            log.write(1, {"loss": 3.0})
            raise FloatingPointError("diverged")

    with pytest.raises(FloatingPointError, match="diverged"):
        diverge()
    assert scalars(tmp_path) == {(1, "loss"): 3.0}

    closed = []

    class Sink:
        def __init__(self, name):
            self.name = name

        def close(self, *, failed):
            closed.append((self.name, failed))
            raise OSError(f"{self.name} cannot close")

    with pytest.raises(OSError, match="cannot close"):
        logs.Logs([Sink("a"), Sink("b")]).close(failed=True)
    assert sorted(closed) == [("a", True), ("b", True)]


def test_other_processes_write_nothing(tmp_path):
    with opened(tmp_path / "run", writes=False, wandb="project") as log:
        log.write(1, {"loss": 1.0})
        log.event(1, "collapse", "…")
    assert not (tmp_path / "run").exists()


# ---- Weights & Biases --------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, which notes what is asked of it."""
    calls = []

    class Run:
        def __getattr__(self, name):
            return lambda *args, **kwargs: calls.append((name, args, kwargs))

    def init(**kwargs):
        calls.append(("init", (), kwargs))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return calls


def test_wandb_gets_the_same_and_one_run_over_a_resume(tmp_path, wandb):
    run = tmp_path / "celeba"
    with opened(run, wandb="faces") as log:
        log.write(10, {"loss": 0.5, "bad": float("nan")})
        log.event(10, "collapse", "…")
    with opened(run, 10, wandb="faces") as log:
        log.write(20, {"loss": 0.4})
    (first, second) = [kwargs for name, _, kwargs in wandb if name == "init"]
    assert first == second
    assert first | {"id": "", "dir": ""} == {
        "project": "faces", "name": "celeba", "config": {"steps": 9}, "resume": "allow", "id": "", "dir": "",
    }  # fmt: skip
    assert first["id"] == (run / "wandb_id").read_text().strip() != ""
    assert "mode" not in first  # so that WANDB_MODE decides
    logged = [args[0] for name, args, kwargs in wandb if name == "log" and not kwargs]
    assert [row["step"] for row in logged] == [10, 20]
    assert logged[0]["loss"] == 0.5
    assert np.isnan(logged[0]["bad"])
    assert ("define_metric", ("*",), {"step_metric": "step"}) in wandb
    assert [kwargs for name, _, kwargs in wandb if name == "finish"] == [{"exit_code": 0}] * 2
    assert any(name == "alert" and "collapse" in kwargs["title"] for name, _, kwargs in wandb)
    assert len(lines(run / "metrics.jsonl")) == 2


def test_wandb_learns_of_a_failure(tmp_path, wandb):
    with pytest.raises(KeyboardInterrupt), opened(tmp_path, wandb="faces"):
        raise KeyboardInterrupt
    assert wandb[-1] == ("finish", (), {"exit_code": 1})


def test_without_the_package_wandb_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # how Python marks what cannot be imported
    with pytest.raises(ImportError, match=r"pip install -e '\.\[wandb\]'"):
        opened(tmp_path / "run", wandb="faces")
    assert not (tmp_path / "run").exists()
    with opened(tmp_path / "run"):
        pass


def test_loggers_are_imported_when_they_are_needed_and_warn_of_nothing(tmp_path):
    code = (
        "import sys; from pathlib import Path; from faceembed.training import logs\n"
        "early = {'tensorboardX', 'wandb', 'jax'} & set(sys.modules)\n"
        f"log = logs.open_logs(Path({str(tmp_path)!r}), 0, config={{}})\n"
        "log.write(1, {'loss': float('nan')}); log.close()\n"
        "print(sorted(early), sorted({'tensorboardX', 'wandb', 'jax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[] ['tensorboardX']\n", "")

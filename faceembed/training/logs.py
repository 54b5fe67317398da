"""What a run writes down while it trains: JSON lines and TensorBoard always, Weights & Biases when asked.

metrics.jsonl   {"step": 50, "loss": 0.18, …}, one object a line
events.jsonl    {"step": 700, "kind": "collapse", "message": "…"}: what went wrong, and what to try
tensorboard/    the same, for `tensorboard --logdir RUN`
wandb_id        the id that a Weights & Biases run is gone on with

On a full disk the training goes on: what cannot be written waits in memory, and is written with a later row.
"""

import contextlib
import json
import logging
import math
import secrets
import shutil
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from tqdm import tqdm

from faceembed import report


class _Sink(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def event(self, step: int, kind: str, message: str) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class Logs:
    """Every logger of a run behind one: what is written goes to all of them. A context manager, which closes them.

    Attributes:
      ongoing: kinds of events that an earlier command logged and that were not over, where this one goes on.
    """

    def __init__(self, sinks: list[_Sink], ongoing: tuple[str, ...] = ()) -> None:
        self._sinks = sinks
        self.ongoing = ongoing

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Measurements at a step.

        Args:
          step: updates done, never less than in the call before.
          values: name → number; a slash in a name groups it ("grad_norm/stem"). A number that is not finite is null in
            metrics.jsonl, since JSON has no NaN, and NaN elsewhere.
        """
        for sink in self._sinks:
            sink.write(step, values)

    def event(self, step: int, kind: str, message: str) -> None:
        """Something a person should know of.

        Args:
          step: where it was noticed.
          kind: in a word, such as "collapse"; "collapse over" when it ends.
          message: the cause, and what to try.
        """
        for sink in self._sinks:
            sink.event(step, kind, message)

    def close(self, *, failed: bool = False) -> None:
        """Writes what is pending; further calls do nothing."""
        sinks, self._sinks = self._sinks, []
        with contextlib.ExitStack() as stack:  # one that cannot be closed does not keep the others open
            for sink in sinks:
                stack.callback(sink.close, failed=failed)

    def __enter__(self) -> "Logs":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)


def open_logs(
    run: Path, first_step: int, *, wandb: str | None = None, config: Mapping[str, Any], writes: bool = True
) -> Logs:
    """Opens the logs of a run, which go on from where its checkpoint stands.

    What an interrupted run logged after that checkpoint is dropped, since the same steps come again: lines from the
    files, and TensorBoard is told to forget them.

    Args:
      run: the run directory; made when missing.
      first_step: the step that training goes on from, 0 at the start.
      wandb: name of a Weights & Biases project, or None to leave it alone. The environment variables of that package
        hold, WANDB_MODE=offline among them.
      config: what the run is, for Weights & Biases; JSON's types.
      writes: whether this process writes; of several processes only the first one should.

    Raises:
      ImportError: a project is given and the package is not installed; nothing has been written then.
    """
    if not writes:
        return Logs([])
    package = import_wandb() if wandb else None
    lines = _Lines(run, first_step)
    # The one that a network can refuse comes first, so that nothing is open when it does.
    remote: list[_Sink] = [_Wandb(package, wandb, run, config)] if package is not None else []
    return Logs([lines, _TensorBoard(run / "tensorboard", first_step), *remote], lines.ongoing())


class _Lines:
    """metrics.jsonl and events.jsonl."""

    def __init__(self, run: Path, first: int) -> None:
        self._metrics, self._events = _File(run / "metrics.jsonl"), _File(run / "events.jsonl")
        _drop_later(run / "metrics.jsonl", first)
        self._kept = _drop_later(run / "events.jsonl", first)

    def ongoing(self) -> tuple[str, ...]:
        """Kinds of the events that were kept and are not over."""
        kinds: dict[str, None] = {}
        for row in self._kept:
            kind = row["kind"].removesuffix(" over")
            kinds.pop(kind, None)
            if kind == row["kind"]:
                kinds[kind] = None
        return tuple(kinds)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._add(self._metrics, {"step": step, **finite})

    def event(self, step: int, kind: str, message: str) -> None:
        self._add(self._events, {"step": step, "kind": kind, "message": message})

    def _add(self, file: "_File", row: dict[str, Any]) -> None:
        file.add((json.dumps(row, ensure_ascii=False) + "\n").encode())

    def close(self, *, failed: bool) -> None:
        self._metrics.close()
        self._events.close()


class _File:
    """A file that is only added to: all that it can take is on its way to the disk when `add` returns.

    What a full disk does not take waits, in order, for the next call, so that nothing is torn or written twice.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting = b""
        self._told = False

    def add(self, data: bytes) -> None:
        self._waiting += data
        try:
            with open(self._path, "ab", buffering=0) as file:
                while self._waiting:
                    self._waiting = self._waiting[file.write(self._waiting) :]
        except OSError as error:
            if not self._told:
                free = shutil.disk_usage(self._path.parent).free
                tqdm.write(
                    f"{self._path} cannot be written ({error.strerror}; {free / 1e6:,.1f} MB are free). The training goes "
                    "on, and writes what is missing when it can."
                )
            self._told = True
        else:
            if self._told:
                tqdm.write(f"{self._path} is written again; nothing is missing in it.")
            self._told = False

    def close(self) -> None:
        self.add(b"")
        if self._waiting:
            tqdm.write(f"{self._path} lacks its last {len(self._waiting):,} bytes: they could not be written.")


def _drop_later(path: Path, first: int) -> list[dict[str, Any]]:
    """Leaves the lines of the steps up to `first`, in a file that is there afterwards, and returns them."""
    kept, rows = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line cut off by a crash; its step comes again
        if row["step"] <= first:
            kept.append(line + "\n")
            rows.append(row)
    report.write_text(path, "".join(kept))
    return rows


class _TensorBoard:
    """Scalars by name, and events as text.

    Written here and not by tensorboardX's `SummaryWriter`: its thread dies of the first error, a full disk for example, and
    the training would then wait for ever for a place in its queue.
    """

    def __init__(self, folder: Path, first: int) -> None:
        from tensorboardX import summary  # takes a second or two: not for `--help`
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._summary, self._event = summary, Event
        # It says "NaN or Inf found" of each; we log them on purpose, and an event tells more.
        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
        folder.mkdir(parents=True, exist_ok=True)
        # Files are named by the second, and one that goes on within the same second would write into the other.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{first}"
        while (folder / name).exists():
            name += "+"
        self._file = _File(folder / name)
        # Also at the start: a command that died before its first checkpoint may have left values behind.
        purge = self._record(step=first + 1, session_log=SessionLog(status=SessionLog.START))
        self._file.add(self._record(file_version="brain.Event:2") + purge)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = (self._summary.scalar(name, float(value)) for name, value in values.items())
        self._file.add(b"".join(self._record(step=step, summary=scalar) for scalar in scalars))

    def event(self, step: int, kind: str, message: str) -> None:
        self._file.add(self._record(step=step, summary=self._summary.text(f"event/{kind}", message)))

    def _record(self, **fields: Any) -> bytes:
        from tensorboardX.record_writer import masked_crc32c

        data = self._event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))  # a TFRecord: length, its checksum, the message, its checksum
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        return length + sums[0] + data + sums[1]

    def close(self, *, failed: bool) -> None:
        self._file.close()


class _Wandb:
    """One Weights & Biases run, the same one after a resume."""

    def __init__(self, package: Any, project: str | None, run: Path, config: Mapping[str, Any]) -> None:
        id_file = run / "wandb_id"
        if not id_file.exists():
            report.write_text(id_file, secrets.token_hex(4) + "\n")
        known = id_file.read_text().strip()
        self._run = package.init(
            project=project, name=run.name, id=known, resume="allow", dir=str(run), config=dict(config)
        )
        # Its own counter only rises and would refuse the steps that come again after an interruption; ours is the axis.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **{name: float(value) for name, value in values.items()}})

    def event(self, step: int, kind: str, message: str) -> None:
        self._run.alert(title=f"{kind} at step {step}", text=message)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def import_wandb() -> Any:
    """The package wandb.

    Raises:
      ImportError: it is not installed; the message says how to get it.
    """
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "logging to Weights & Biases needs its package, which is not installed: pip install -e '.[wandb]', or leave "
            "--wandb out (metrics.jsonl and TensorBoard are written anyway)."
        ) from error
    return wandb

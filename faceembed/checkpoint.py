"""Checkpoints in a run directory, through Orbax.

    RUN/config.json            the experiment (also inside every step)
    RUN/metrics.jsonl          one JSON object a line
    RUN/lock                   held while a training runs
    RUN/checkpoints/STEP/params | train | data | config | metrics | SHA256SUMS
    RUN/damaged/STEP           a step that was found to be damaged, out of the way

`params` holds parameters, batch statistics and their moving averages: all that evaluation reads. `train` holds the
optimizer's state, the memory of a loss that has one, the step and the count of skipped updates. `data` says what was
trained on. `SHA256SUMS` names every file of the step, as `sha256sum --check` reads it: Orbax alone does not notice a
changed byte of an array. The latest two steps and the best are kept.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from faceembed import config as configs
from faceembed import losses, report
from faceembed.training.step import TrainState

ITEMS = ("params", "train", "data", "config")

SUMS = "SHA256SUMS"
"""In a step: the SHA-256 of each of its files."""

UNSCORED = -1.0
"""Score of a step that was saved without an evaluation: below any AUC, so never the best of a run that has another."""


def _quiet(record: logging.LogRecord) -> bool:
    """Leaves out what Orbax logs about a save that failed, thousands of lines: `Checkpoints` says it in one."""
    return "orbax" not in record.pathname and "orbax" not in record.getMessage()


def _manager(run: Path, keep_best: int) -> ocp.CheckpointManager:
    if not os.environ.get("FACEEMBED_TRACEBACK"):
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_quiet)  # the same filter is added once
    score = lambda metrics: metrics["score"]  # noqa: E731
    # best_fn with max_to_keep would delete the LAST step, which breaks resuming; best_fn alone is what makes Orbax
    # write the metrics down, so both are set. Two of the latest: one to fall back to if the other is damaged.
    policy = checkpoint_managers.AnyPreservationPolicy(
        [checkpoint_managers.LatestN(2), checkpoint_managers.BestN(get_metric_fn=score, n=keep_best)]
    )
    options = ocp.CheckpointManagerOptions(
        best_fn=score, best_mode="max", preservation_policy=policy, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager((run / "checkpoints").resolve(), item_names=ITEMS, options=options)


class Checkpoints:
    """Writes and restores the steps of one run directory; a context manager that waits for the last save.

    A save that fails does not end the training: `failures` tells of it, and the next save starts from a clean directory.
    Only when the last one has failed, `wait` and the end of the context raise.

    Args:
      run: the run directory.
      keep_best: how many of the best steps are kept beside the latest two.
    """

    def __init__(self, run: Path, keep_best: int = 1) -> None:
        self._run, self._keep_best = run, keep_best
        self._manager = _manager(run, keep_best)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: concurrent.futures.Future[None] | None = None
        self._step = self._bytes = 0
        self._failed = ""
        self._untold: list[str] = []

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._settle()
            self._manager.close()
        finally:
            self._thread.shutdown()
        if self._failed and kind is None:
            raise OSError(self._failed)
        for failure in self._untold:
            print(failure)

    @property
    def latest(self) -> int | None:
        """Newest complete step; None when there is none."""
        return self._manager.latest_step()

    def save(
        self, state: TrainState, experiment: configs.Experiment, data: dict[str, Any], score: float = UNSCORED
    ) -> None:
        """Starts an asynchronous save; the arrays are copied before this returns, so the state may be donated.

        Args:
          data: JSON-able facts of what was trained on.
          score: what the best step is chosen by, at least 0; higher is better. Without one it is never the best.
        """
        self._settle()
        step = int(state.step)
        self._step, self._bytes = step, self._size(state)
        self._failed = ""
        try:
            # Told before anything is half written; several processes would have to agree.
            if jax.process_count() == 1 and shutil.disk_usage(self._run).free < self._bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(_params_item(state)),
                    train=ocp.args.StandardSave(_train_item(state)),
                    data=ocp.args.JsonSave({**data, "step": step}),
                    config=ocp.args.JsonSave({"json": configs.to_json(experiment)}),
                ),
                metrics={"score": float(score)},
            )
        except Exception as error:  # Orbax raises many kinds; see `_settle`
            self._fail(error)
        else:
            self._saving = self._thread.submit(self._finish, self._manager, step)

    def _size(self, state: TrainState) -> int:
        """What a save takes, in bytes: as much as the last one, which compression and small files make more or less."""
        if self.latest is None:
            return sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        files = (self._run / "checkpoints" / str(self.latest)).rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())

    def _finish(self, manager: ocp.CheckpointManager, step: int) -> None:
        """Waits for a save to be in place, then seals it."""
        manager.wait_until_finished()
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # it is saved all the same, and sealed by the next command
                seal(self._run / "checkpoints" / str(step))

    def _settle(self) -> None:
        """Waits for the save that is under way, if any, and takes note if it failed."""
        saving, self._saving = self._saving, None
        if saving is not None and (error := saving.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if jax.process_count() > 1:
            # The others think that it went well, or wait for this one: no process alone can put that right.
            raise error
        # A manager that failed has forgotten steps that are there; a new one also removes what was half written.
        with contextlib.suppress(Exception):
            self._manager.close()
        self._manager = _manager(self._run, self._keep_best)
        free = shutil.disk_usage(self._run).free
        latest = self.latest
        good = f"step {latest} is the last one saved" if latest is not None else "there is no other"
        reason = next((text for text in (os.strerror(number) for number in _USUAL) if text in str(error)), None)
        self._failed = (
            f"the checkpoint of step {self._step} could not be saved in {self._run / 'checkpoints'}: "
            f"{reason or ' '.join(str(error).split())[:300] or type(error).__name__} ({free / 1e6:,.1f} MB are free there, "
            f"and it takes about {self._bytes / 1e6:,.1f} MB); {good}."
        )
        self._untold.append(self._failed)

    def failures(self) -> list[str]:
        """What became of the saves that have failed since the last call. Waits for nothing."""
        if self._saving is not None and self._saving.done():
            self._settle()
        untold, self._untold = self._untold, []
        return untold

    def wait(self) -> None:
        """Until the last save is complete.

        Raises:
          OSError: it failed; the message says why and what is there.
        """
        self._settle()
        if self._failed:
            raise OSError(self._failed)

    @property
    def data(self) -> dict[str, Any]:
        """The facts of what was trained on, of the newest step."""
        return self._manager.restore(self.latest, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]

    def check_data(self, data: dict[str, Any], run: Path) -> None:
        """Refuses to go on with other photos than the newest step was trained on: the plan of batches would be another.

        Raises:
          ValueError: if the sources' fingerprints differ.
        """
        stored = self.data
        if stored["fingerprint"] != data["fingerprint"] and (stored.get("excluded") or data.get("excluded")):
            raise ValueError(
                f"{run} was trained on {stored['photos']:,} photos with {stored.get('excluded', 0):,} left out, and now "
                f"would be on {data['photos']:,} with {data.get('excluded', 0):,} left out, or others. Give --data.exclude "
                "the file that it was begun with, or start afresh with another --run-dir."
            )
        if stored["fingerprint"] != data["fingerprint"]:
            raise ValueError(
                f"{data['source']} is not what {run} was trained on: {stored['people']:,} training people with "
                f"{stored['photos']:,} photos there, {data['people']:,} with {data['photos']:,} now, and other contents. "
                "Bring the photos back as they were, or start afresh with another --run-dir."
            )

    def restore(self, state: TrainState) -> TrainState:
        """The newest step, laid out as `state` is: its shardings decide, so any number of devices restores any other's.

        Args:
          state: a fresh state, or its abstract shapes with shardings.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, (_params_item(state), _train_item(state)))
        restored = self._manager.restore(
            self.latest,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract[0]), train=ocp.args.StandardRestore(abstract[1])
            ),
        )
        params, train = restored["params"], restored["train"]
        return TrainState(
            step=train["step"],
            skipped=train["skipped"],
            opt_state=train["opt_state"],
            params={"encoder": params["params"], "loss": params["loss"]},
            batch_stats=params["batch_stats"],
            ema=params["ema"],
            memory=losses.Memory(**train["memory"]) if state.memory else None,
        )


_USUAL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
"""Why files cannot be written; Orbax's message around these words fills a screen."""


def _params_item(state: TrainState) -> dict[str, Any]:
    return {
        "params": state.params["encoder"],
        "loss": state.params["loss"],
        "batch_stats": state.batch_stats,
        "ema": state.ema,
    }


def _train_item(state: TrainState) -> dict[str, Any]:
    # Runs without a memory have no entry for it, as runs from before there was one.
    memory = {"memory": state.memory._asdict()} if state.memory else {}
    return {"opt_state": state.opt_state, "step": state.step, "skipped": state.skipped, **memory}


def write(run: Path, experiment: configs.Experiment, variables: Any, data: dict[str, Any]) -> None:
    """Writes variables from elsewhere as a run directory of one step, 0: evaluation and `--init` read it as any other.

    Args:
      run: a folder that is not there yet, or empty.
      experiment: names the encoder and how photos are read.
      variables: {"params", "batch_stats"}.
      data: JSON-able facts of where they come from.

    Raises:
      FileExistsError: the folder holds something.
    """
    if run.exists() and any(run.iterdir()):
        raise FileExistsError(f"{run} is not empty: give a folder of its own, or remove what is in it.")
    manager = _manager(run, keep_best=1)
    arrays = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    with contextlib.closing(manager):
        manager.save(
            0,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave({**arrays, "loss": {}, "ema": arrays}),
                data=ocp.args.JsonSave({**data, "step": 0}),
                config=ocp.args.JsonSave({"json": configs.to_json(experiment)}),
            ),
            metrics={"score": 0.0},
        )
        manager.wait_until_finished()
    seal(run / "checkpoints" / "0")
    report.write_text(run / "config.json", configs.to_json(experiment))


def check_same(run: Path, experiment: configs.Experiment) -> None:
    """Refuses to go on with a run under another experiment.

    How often to save and to log, where data lies, and what changes an update by rounding alone, may change: the tile, and
    microbatches without batch normalisation. Nothing that changes what is trained may.

    Raises:
      ValueError: naming every field that differs; or the directory holds weights from elsewhere, and no training.
    """
    complete = _complete_steps(run)
    if not complete:
        return
    if not any((step / "train").is_dir() for step in complete):
        raise ValueError(
            f"{run} holds imported weights and no training to go on with. Start from them in a directory of its own: "
            f"--init {run} --run-dir {run}-trained."
        )
    path = run / "config.json"
    newest = max(complete, key=lambda step: int(step.name))
    stored = configs.from_json(path.read_text()) if path.exists() else _config_of(newest)

    def comparable(value: configs.Experiment) -> configs.Experiment:
        # What an exclude file names is part of the photos' fingerprint, wherever it lies.
        data = dataclasses.replace(value.data, data_dir=None, memory_gb=1.0, exclude=None)
        loss, batch = value.loss, value.batch
        if isinstance(loss, configs.Triplet):
            loss = dataclasses.replace(loss, tile=None)
        if isinstance(value.encoder, configs.DlibResNet):
            batch = dataclasses.replace(batch, microbatches=1)
        return dataclasses.replace(value, data=data, loss=loss, batch=batch, checkpoint=configs.Checkpoint())

    differences = _differences(comparable(stored), comparable(experiment), "")
    if differences:
        lines = "\n".join(f"  {name}: {old!r} there, {new!r} now" for name, old, new in differences)
        raise ValueError(
            f"{run} holds a run of another experiment:\n{lines}\n"
            "To go on with it, leave these flags as they were; to start afresh, give another --run-dir."
        )


def _differences(old: Any, new: Any, name: str) -> Iterator[tuple[str, Any, Any]] | list[tuple[str, Any, Any]]:
    if dataclasses.is_dataclass(old) and type(old) is type(new):
        found = []
        for field in dataclasses.fields(old):
            inner = f"{name}.{field.name}" if name else field.name
            found += list(_differences(getattr(old, field.name), getattr(new, field.name), inner))
        return found
    return [] if old == new else [(name, old, new)]


def _config_of(step: Path) -> configs.Experiment:
    with contextlib.closing(ocp.JsonCheckpointHandler()) as facts:
        return configs.from_json(facts.restore(step.resolve() / "config")["json"])


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Holds a run directory; the lock goes with the process, however that ends, so none is ever stale.

    The file names the process and its host. A name left in it, without the lock, is of one that was killed: it is told.

    Raises:
      BlockingIOError: if another process holds it; the message names that process.
      OSError: if the file system has no locks.
    """
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "lock", "a+b", buffering=0) as file:

        def owner() -> str:
            file.seek(0)
            return file.read().decode(errors="replace").strip()

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"{run} is being trained by process {owner() or 'unknown'}. Wait for it, stop it, or give another "
                "--run-dir."
            ) from None
        except OSError as error:
            raise OSError(
                f"{run} cannot be locked ({error.strerror}): its file system has no flock, without which two trainings "
                "could write to one directory. Give a --run-dir on another disk, or have this one mounted with locks."
            ) from error
        here = socket.gethostname()
        # Not before it is locked: one that ended meanwhile took its name away.
        if former := owner():
            elsewhere = "" if former.endswith(f" on {here}") else " If it still runs there, stop this command."
            print(f"note: process {former}, which trained in {run}, was killed or its machine stopped.{elsewhere}")
        try:
            with contextlib.suppress(OSError):  # on a full disk it is held without a name
                file.truncate(0)
                file.write(f"{os.getpid()} on {here}".encode())
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def started(run: Path) -> bool:
    """Whether a run directory holds a complete checkpoint to go on from."""
    return bool(_complete_steps(run))


def _complete_steps(run: Path) -> list[Path]:
    # Orbax renames a step into place when it is whole: a directory with a bare number is a complete one.
    folder = run / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else ()
    return [step for step in found if step.name.isdigit() and (step / "metrics").is_dir()]


def seal(step: Path) -> None:
    """Writes `SHA256SUMS` into a complete step, when every byte of it is on the disk and not only on its way there."""
    lines = []
    for path in sorted(step.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if path.is_file() and path.name != SUMS:
                with open(descriptor, "rb", closefd=False) as file:
                    lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(step)}\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    report.write_text(step / SUMS, "".join(lines))
    for folder in (step, step.parent):
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def damage(step: Path, items: Sequence[str] = (*ITEMS, "metrics")) -> str | None:
    """What is wrong with the files of a step directory; None if nothing is.

    A file that `SHA256SUMS` does not name tells that they are cut off; hidden ones, which a file system leaves, do not
    count. A step without `SHA256SUMS`, since its training was killed just before they were written or is older than they
    are, is read instead.

    Args:
      step: the step directory.
      items: looked at; those that imported weights do not have are left out.
    """
    missing = [item for item in items if item != "train" and not (step / item).is_dir()]
    if missing:
        return f"{missing[0]} is missing"
    if not (step / SUMS).exists():
        return _unreadable(step, [item for item in items if (step / item).is_dir()])
    try:
        sums = [line.split("  ", 1) for line in (step / SUMS).read_text().splitlines()]
        expected = {name: digest for digest, name in sums}
    except ValueError:
        return f"{SUMS} does not read"
    there = {str(path.relative_to(step)) for path in step.rglob("[!.]*") if path.is_file() and path.name != SUMS}
    for name in sorted(there | expected.keys()):
        if "/" in name and name.split("/")[0] not in items:
            continue
        if name not in expected:
            return f"{SUMS} does not name {name}"
        try:
            with open(step / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
        except OSError as error:
            return f"{name} does not read ({error.strerror})"
        if found != expected[name]:
            return f"{name} ({size:,} bytes) is not what was saved"
    return None


def _unreadable(step: Path, items: Sequence[str]) -> str | None:
    facts, arrays = ocp.JsonCheckpointHandler(), ocp.PyTreeCheckpointHandler()
    with contextlib.closing(facts), contextlib.closing(arrays):
        for item in items:
            try:
                if item in ("params", "train"):
                    _as_numpy(arrays, step / item)
                elif item == "metrics":
                    float(_score(step))
                else:
                    facts.restore(step / item)
            except Exception as error:  # Orbax raises all kinds on damaged files
                return f"{item} does not read ({' '.join(str(error).split())[:200] or type(error).__name__})"
    return None


def set_aside_damaged(run: Path) -> list[str]:
    """Moves damaged steps out of the way, to RUN/damaged, so that training goes on from the newest that is whole.

    To be called by the first process alone, while the others wait and nobody has opened the steps.

    Returns:
      A sentence for each.

    Raises:
      ValueError: no step is whole.
    """
    told = []
    folder = run / "checkpoints"
    steps = sorted(int(step.name) for step in folder.iterdir() if step.name.isdigit()) if folder.is_dir() else []
    reasons = {step: reason for step in steps if (reason := damage((folder / str(step)).resolve()))}
    if steps and len(reasons) == len(steps):
        lines = "\n".join(f"  step {step}: {reason}" for step, reason in reasons.items())
        raise ValueError(
            f"every checkpoint of {run} is damaged:\n{lines}\n"
            "Bring one back from a copy, or start afresh with another --run-dir."
        )
    for step, reason in reasons.items():
        kept = run / "damaged" / str(step)
        while kept.exists():
            kept = kept.with_name(f"{kept.name}-again")
        kept.parent.mkdir(exist_ok=True)
        (folder / str(step)).rename(kept)
        told.append(f"the checkpoint of step {step} is damaged: {reason}. It is left out, and kept as {kept}.")
    for step in set(steps) - set(reasons):
        if not (folder / str(step) / SUMS).exists():
            seal(folder / str(step))
    return told


def _score(step: Path) -> float:
    return json.loads((step / "metrics" / "metrics").read_text())["score"]


def find_step(path: Path) -> Path:
    """The step directory meant by a path: itself, or the best step of a run directory.

    Raises:
      FileNotFoundError: if there is no complete checkpoint; the message says what is there.
      ValueError: if a score does not read.
    """
    path = Path(path)
    if (path / "params").is_dir():
        return path
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: expected a run directory of `launch.py train`, or a step of one."
        )
    scores = {}
    for step in _complete_steps(path):
        try:
            scores[step] = _score(step)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(_damaged(step, f"metrics does not read ({error})")) from error
    if not scores:
        raise FileNotFoundError(
            f"{path} holds no complete checkpoint: expected {path}/checkpoints/STEP/params. "
            "If the run was stopped before its first save, start the same command again. "
            "A folder here goes before a pretrained network of its name."
        )
    return max(scores, key=lambda step: (scores[step], int(step.name)))


def _damaged(step: Path, reason: str) -> str:
    others = sorted(int(other.name) for other in step.parent.iterdir() if other.name.isdigit() and other != step)
    there = f"name another step of it ({step.parent}/{others[-1]}), or " if others else ""
    return (
        f"the checkpoint {step} is damaged: {reason}. Bring it back from a copy, {there}give the training command again, "
        "which leaves it out."
    )


def read_evaluation(path: Path) -> tuple[configs.Experiment, dict[str, Any], dict[str, Any]]:
    """Reads what evaluation needs of a checkpoint: nothing of the optimizer, nor of a loss that has millions of weights.

    Args:
      path: a run directory (its best step is taken) or a step directory.

    Returns:
      (experiment, variables, data): `variables` are the averaged {"params", "batch_stats"} as NumPy arrays, on no
      device, whatever devices trained them.

    Raises:
      FileNotFoundError: there is no complete checkpoint.
      ValueError: it is damaged; the message says which file.
    """
    step = find_step(path)
    step = step.resolve()
    if reason := damage(step, ("params", "data", "config")):
        raise ValueError(_damaged(step, reason))
    facts = ocp.JsonCheckpointHandler()
    arrays = ocp.PyTreeCheckpointHandler()
    with contextlib.closing(facts), contextlib.closing(arrays):
        experiment = _config_of(step)
        data = facts.restore(step / "data")
        ema = _as_numpy(arrays, step / "params", only="ema")["ema"]
    return experiment, {"params": ema["params"], "batch_stats": ema["batch_stats"]}, data


def _as_numpy(arrays: ocp.PyTreeCheckpointHandler, item: Path, only: str | None = None) -> Any:
    """An item's arrays, or those of one of its entries: the others are not read."""
    abstract = arrays.metadata(item).tree
    as_numpy = partial(jax.tree.map, lambda _: ocp.RestoreArgs(restore_type=np.ndarray))
    if only is None:
        return arrays.restore(item, args=ocp.args.PyTreeRestore(restore_args=as_numpy(abstract)))
    part = {only: abstract[only]}
    wanted = ocp.args.PyTreeRestore(item=part, restore_args=as_numpy(part), partial_restore=True)
    return arrays.restore(item, args=wanted)


def fingerprint(tree: Any) -> str:
    """sha256 over names, shapes, types and bytes of all leaves: equal when every bit is."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()

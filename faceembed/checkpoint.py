"""Checkpoints in a run directory, through Orbax.

    RUN/config.json            the experiment (also inside every step)
    RUN/metrics.jsonl          one JSON object a line
    RUN/lock                   held while a training runs
    RUN/checkpoints/STEP/params | train | data | config | metrics

`params` holds parameters, batch statistics and their moving averages: all that evaluation reads. `train` holds the
optimizer's state, the memory of a loss that has one, the step and the count of skipped updates. `data` says what was
trained on. The latest and the best step are kept.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
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


def _manager(run: Path, keep_best: int) -> ocp.CheckpointManager:
    score = lambda metrics: metrics["score"]  # noqa: E731
    # best_fn with max_to_keep would delete the LAST step, which breaks resuming; best_fn alone is what makes Orbax
    # write the metrics down, so both are set.
    policy = checkpoint_managers.AnyPreservationPolicy(
        [checkpoint_managers.LatestN(1), checkpoint_managers.BestN(get_metric_fn=score, n=keep_best)]
    )
    options = ocp.CheckpointManagerOptions(
        best_fn=score, best_mode="max", preservation_policy=policy, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager((run / "checkpoints").resolve(), item_names=ITEMS, options=options)


class Checkpoints:
    """Writes and restores the steps of one run directory; a context manager that waits for the last save.

    Args:
      run: the run directory.
      keep_best: how many of the best steps are kept beside the latest.
    """

    def __init__(self, run: Path, keep_best: int = 1) -> None:
        self._manager = _manager(run, keep_best)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Newest complete step; None when there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, experiment: configs.Experiment, data: dict[str, Any], score: float) -> None:
        """Starts an asynchronous save; the arrays are copied before this returns, so the state may be donated.

        Args:
          data: JSON-able facts of what was trained on.
          score: what the best step is chosen by; higher is better.
        """
        step = int(state.step)
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
    report.write_text(run / "config.json", configs.to_json(experiment))


def check_same(run: Path, experiment: configs.Experiment) -> None:
    """Refuses to go on with a run under another experiment.

    How often to save and to log, and where data lies, may change; nothing that changes what is trained may.

    Raises:
      ValueError: naming every field that differs; or the directory holds weights from elsewhere, and no training.
    """
    path = run / "config.json"
    if not path.exists() or not started(run):
        return
    if not any((step / "train").is_dir() for step in _complete_steps(run)):
        raise ValueError(
            f"{run} holds imported weights and no training to go on with. Start from them in a directory of its own: "
            f"--init {run} --run-dir {run}-trained."
        )
    stored = configs.from_json(path.read_text())

    def comparable(value: configs.Experiment) -> configs.Experiment:
        # What an exclude file names is part of the photos' fingerprint, wherever it lies.
        data = dataclasses.replace(value.data, data_dir=None, memory_gb=1.0, exclude=None)
        return dataclasses.replace(value, data=data, checkpoint=configs.Checkpoint())

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


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Holds a run directory; the lock goes with the process, however that ends, so none is ever stale.

    Raises:
      BlockingIOError: if another process holds it; the message names that process.
    """
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise BlockingIOError(
                f"{run} is being trained by process {owner}. Wait for it, stop it, or give another --run-dir."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def started(run: Path) -> bool:
    """Whether a run directory holds a complete checkpoint to go on from."""
    return bool(_complete_steps(run))


def _complete_steps(run: Path) -> list[Path]:
    # Orbax renames a step into place when it is whole: a directory with a bare number is a complete one.
    folder = run / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else ()
    return [step for step in found if step.name.isdigit() and (step / "metrics").is_dir()]


def find_step(path: Path) -> Path:
    """The step directory meant by a path: itself, or the best step of a run directory.

    Raises:
      FileNotFoundError: if there is no complete checkpoint; the message says what is there.
    """
    path = Path(path)
    if (path / "params").is_dir():
        return path
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: expected a run directory of `launch.py train`, or a step of one."
        )
    scores = {step: json.loads((step / "metrics" / "metrics").read_text())["score"] for step in _complete_steps(path)}
    if not scores:
        raise FileNotFoundError(
            f"{path} holds no complete checkpoint: expected {path}/checkpoints/STEP/params. "
            "If the run was stopped before its first save, start the same command again. "
            "A folder here goes before a pretrained network of its name."
        )
    return max(scores, key=lambda step: (scores[step], int(step.name)))


def read_evaluation(path: Path) -> tuple[configs.Experiment, dict[str, Any], dict[str, Any]]:
    """Reads what evaluation needs of a checkpoint, and nothing of the optimizer.

    Args:
      path: a run directory (its best step is taken) or a step directory.

    Returns:
      (experiment, variables, data): `variables` are the averaged {"params", "batch_stats"} as NumPy arrays, on no
      device, whatever devices trained them.
    """
    step = find_step(path)
    step = step.resolve()
    facts = ocp.JsonCheckpointHandler()
    arrays = ocp.PyTreeCheckpointHandler()
    with contextlib.closing(facts), contextlib.closing(arrays):
        experiment = configs.from_json(facts.restore(step / "config")["json"])
        data = facts.restore(step / "data")
        abstract = arrays.metadata(step / "params").tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
        ema = arrays.restore(step / "params", args=ocp.args.PyTreeRestore(restore_args=as_numpy))["ema"]
    return experiment, {"params": ema["params"], "batch_stats": ema["batch_stats"]}, data


def fingerprint(tree: Any) -> str:
    """sha256 over names, shapes, types and bytes of all leaves: equal when every bit is."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()

"""The training loop, on one screen: `train` reads from top to bottom."""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from faceembed import checkpoint, config, embed, evaluate, losses, metrics, preprocess, report
from faceembed import mesh as meshes
from faceembed.data import augment, pairs, pipeline, sampling, sources
from faceembed.training import step as steps


def train(
    experiment: config.Experiment,
    run: Path,
    *,
    devices: int | None = None,
    progress: bool = True,
    started: float | None = None,
) -> dict[str, Any]:
    """Trains, or goes on with the training of a run directory, and ends with verification of report people.

    Args:
      experiment: what to train; a run directory that holds another experiment is refused.
      run: where checkpoints, metrics and results go; made when missing.
      devices: how many devices the batch is divided over; None takes all.
      progress: show progress bars.
      started: `time.perf_counter()` when the command was given, for the time to the first step; now when not given.

    Returns:
      What `results.json` holds: the verification table and where it came from.

    Raises:
      ValueError: the batch does not divide over the devices, the source has too few people, or the run differs.
      BlockingIOError: another process trains in the run directory.
    """
    started = time.perf_counter() if started is None else started
    if experiment.precision == "float64":
        jax.config.update("jax_enable_x64", True)
    pre, batch, schedule = experiment.preprocess, experiment.batch, experiment.schedule
    mesh = meshes.make_mesh(devices)
    meshes.check_batch(mesh, batch.people, batch.photos)
    with checkpoint.locked(run):
        checkpoint.check_same(run, experiment)

        # ---- data: photos, people split once, the P×K plan ---------------------------------------------------------
        photos = open_data(experiment.data, size=pre.size, seed=experiment.seed, progress=progress)
        for line in sources.problem_lines(photos):
            print(line)
        people_of = evaluate.split_photos(photos)
        learn = people_of["train"]
        sampler = sampling.make_sampler(
            learn.identity, people=batch.people, photos=batch.photos, seed=experiment.seed, singletons=batch.singletons
        )
        select = _Select.read(people_of["select"], pre, progress)
        about = {
            "source": photos.source,
            "fingerprint": photos.fingerprint,
            "photos": len(learn),
            "people": len(learn.people),
            "problems": len(photos.problems),
            "people_hashes": [evaluate.person_hash(person) for person in learn.people],
        }

        # ---- encoder, loss, optimizer, state -----------------------------------------------------------------------
        encoder = embed.build_encoder(experiment)
        loss, loss_params = make_loss(experiment.loss, experiment.encoder.dim)
        optimizer, learning_rate = steps.make_optimizer(
            _rule(experiment.optimizer), learning_rate=schedule.learning_rate, warmup=schedule.warmup,
            steps=experiment.steps, weight_decay=schedule.weight_decay, clip_norm=schedule.clip_norm,
        )  # fmt: skip
        dtype = jnp.float64 if experiment.precision == "float64" else jnp.float32
        state = steps.init_state(
            encoder, optimizer, seed=experiment.seed, size=pre.size, loss_params=loss_params, dtype=dtype
        )
        state = jax.device_put(state, meshes.state_sharding(mesh, state))
        views = make_views(experiment)
        update = steps.make_train_step(
            encoder, loss, optimizer, views, seed=experiment.seed, ema=schedule.ema, mesh=mesh, state=state
        )
        embed_fn = embed.make_embed(encoder, pre)

        if schedule.warmup >= experiment.steps:
            print(f"note: a warm-up of {schedule.warmup} steps ends with the run; --schedule.warmup 0 turns it off.")
        # From here on the directory holds a run of this experiment; nothing before has written to it.
        report.write_text(run / "config.json", config.to_json(experiment))
        with checkpoint.Checkpoints(run, experiment.checkpoint.keep_best) as checkpoints:
            # ---- where an earlier command stopped ------------------------------------------------------------------
            first = checkpoints.latest or 0
            if first:
                checkpoints.check_data(about, run)
                state = checkpoints.restore(state)
                where = "complete at" if first == experiment.steps else "going on from"
                print(f"{run}: {where} step {first} of {experiment.steps}")
            log = MetricsLog(run / "metrics.jsonl", first)
            record_environment(run, mesh)

            # ---- the loop ------------------------------------------------------------------------------------------
            host = pipeline.batches(
                learn, sampler, size=pre.size, margin=experiment.data.margin, start_step=first, steps=experiment.steps,
                process=jax.process_index(), processes=jax.process_count(),
                memory_limit_bytes=experiment.data.memory_gb * 1e9, progress=progress,
            ) if first < experiment.steps else iter(())  # fmt: skip
            bar = progress_bar(experiment.steps, first, progress)
            pending: list[dict[str, jax.Array]] = []
            clock, timed = time.perf_counter(), 0
            for number, moved in enumerate(meshes.to_devices(host, mesh), start=first + 1):
                state, measured = update(state, moved)
                pending.append(measured)
                timed += sampler.size
                bar.update()
                if number == first + 1:
                    jax.block_until_ready(measured)
                    tqdm.write(f"first step done {time.perf_counter() - started:.1f} s after the command")
                    clock, timed = time.perf_counter(), 0
                save = number % experiment.checkpoint.every == 0 or number == experiment.steps
                # A save ends a row of the log, so that a run that goes on from it writes the rows it would have written.
                if number % experiment.checkpoint.log == 0 or save:
                    means = _means(pending)  # the only place where the host waits for the device
                    rate = timed / (time.perf_counter() - clock) if timed else float("nan")
                    applied = learning_rate(number - 1 - int(means["skipped"]))
                    log.write(number, {**means, "learning_rate": float(applied), "images_per_s": rate})
                    bar.set_postfix_str(_postfix(means, rate))
                    if means["skipped"]:
                        tqdm.write(
                            f"step {number}: {means['skipped']:.0f} updates so far were not finite and not applied"
                        )
                    pending, clock, timed = [], time.perf_counter(), 0
                if save:
                    score = select.auc(embed_fn, state.ema)
                    log.write(number, {"select_auc": score})
                    checkpoints.save(state, experiment, about, score)
                    tqdm.write(f"step {number}: AUC {score:.4f} on pairs of {select.people} select people")
                    clock, timed = time.perf_counter(), 0
            bar.close()

        # ---- verification of people nobody has looked at so far ----------------------------------------------------
        return evaluate.final_report(run, people_of, progress=progress)


def open_data(data: config.Data, *, size: int, seed: int, progress: bool = True) -> sources.Photos:
    """The source an experiment names. Synthetic photos are drawn in the encoder's size, so that none is resized."""
    if data.source != "synthetic":
        return sources.open_source(data.source, data_dir=data.data_dir, progress=progress)
    return sources.open_source("synthetic", people=data.people, photos=data.photos, seed=seed, size=size)


def make_loss(loss: config.Loss, dim: int) -> tuple[steps.LossFn, Any]:
    """A configured loss as (function of (emb, identity, params, key, axis_name), its initial parameters)."""
    match loss:
        case config.Triplet():
            return lambda emb, identity, _, key, axis: losses.triplet_loss(
                emb, identity, margin=loss.margin, miner=loss.miner, key=key, axis_name=axis
            ), {}
        case config.Contrastive():
            return lambda emb, identity, _, __, axis: losses.contrastive_loss(
                emb, identity, margin=loss.margin, axis_name=axis
            ), {}
        case config.PairLogistic():
            return lambda emb, identity, params, _, axis: losses.pair_logistic_loss(
                emb, identity, params, axis_name=axis
            ), losses.init_pair_logistic(dim)


def make_views(experiment: config.Experiment) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """(step, slot [b], uint8 images) → what the encoder sees in training: augmented and normalised."""
    pre, options = experiment.preprocess, dataclasses.asdict(experiment.augment)
    dtype = "float64" if experiment.precision == "float64" else "float32"

    def views(step: jax.Array, slot: jax.Array, images: jax.Array) -> jax.Array:
        keys = augment.slot_keys(experiment.seed, step, slot)
        return preprocess.normalize(pre, augment.augment(keys, images, size=pre.size, dtype=dtype, **options))

    return views


def _rule(optimizer: config.Optimizer) -> optax.GradientTransformation:
    match optimizer:
        case config.AdamW():
            return optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2)
        case config.SGD():
            return optax.trace(decay=optimizer.momentum, nesterov=True)


@dataclasses.dataclass(frozen=True)
class _Select:
    """Pairs of select people, held in memory: what the best checkpoint is chosen by."""

    crops: np.ndarray
    first: np.ndarray
    second: np.ndarray
    same: np.ndarray
    people: int

    @classmethod
    def read(cls, photos: sources.Photos, pre: preprocess.Preprocess, progress: bool) -> "_Select":
        chosen = pairs.heldout(photos, "select")
        first, second = pairs.resolve(chosen, photos)
        crops = pipeline.decode_all(photos, pre.size, progress=progress)
        return cls(crops, first, second, chosen.same, len(photos.people))

    def auc(self, embed_fn: embed.EmbedFn, variables: Any) -> float:
        emb = embed.embed_all(embed_fn, variables, self.crops)
        distance = ((emb[self.first].astype(np.float64) - emb[self.second]) ** 2).sum(1)
        # A diverged network must not end the run: it is merely never the best.
        return metrics.auc(-distance, self.same) if np.isfinite(distance).all() else 0.0


def progress_bar(total: int, first: int, shown: bool) -> tqdm:
    """A bar of steps with images/s and the time left; in a log file it adds a line each half minute."""
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(total=total, initial=first, unit="step", disable=not shown, smoothing=0.05, mininterval=interval)


def _postfix(means: dict[str, float], rate: float) -> str:
    active = f", active {means['active']:.0%}" if "active" in means else ""
    return f"loss {means['loss']:.4f}{active}, {rate:.0f} img/s"


def _means(pending: list[dict[str, jax.Array]]) -> dict[str, float]:
    """The mean of each metric since the last log; of the count of skipped updates, the newest."""
    values = jax.device_get(pending)
    means = {name: float(np.mean([row[name] for row in values])) for name in values[0]}
    return {**means, "skipped": float(values[-1]["skipped"])}


class MetricsLog:
    """metrics.jsonl: one JSON object a line, each with its step.

    Args:
      path: the file.
      first: the step that training goes on from; later lines, of an interrupted run, are dropped.
    """

    def __init__(self, path: Path, first: int) -> None:
        kept = []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # a line cut off by a crash; its step comes again
            if row["step"] <= first:
                kept.append(line + "\n")
        report.write_text(path, "".join(kept))
        self._path = path

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line. A value that is not finite is written as null, since JSON has no NaN."""
        row = {"step": step, **{name: value if np.isfinite(value) else None for name, value in values.items()}}
        with open(self._path, "a") as file:
            file.write(json.dumps(row) + "\n")


def processor() -> str:
    """Model and a digest of the instruction sets: what XLA compiles for, so what decides the last bits on a CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    info = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    digest = hashlib.sha256(info.get("flags", info.get("Features", "")).encode()).hexdigest()[:8]
    return f"{info.get('model name', platform.machine())} {digest}"


def record_environment(run: Path, mesh: Any) -> None:
    """Writes what a bit-exact resume depends on to environment.json, and says what changed since the last command."""
    now = {
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "flax": importlib.metadata.version("flax"),
        "optax": importlib.metadata.version("optax"),
        "python": platform.python_version(),
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.devices.size,
        "processor": processor(),
    }
    path = run / "environment.json"
    before = json.loads(path.read_text()) if path.exists() else now
    changed = [f"{name} {before.get(name)} → {value}" for name, value in now.items() if before.get(name) != value]
    if changed:
        print(f"note: {', '.join(changed)}: the run goes on, but not bit for bit as it would have.")
    report.write_text(path, json.dumps(now, indent=1) + "\n")

"""The training loop, on one screen: `train` reads from top to bottom."""

import dataclasses
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from faceembed import checkpoint, config, embed, evaluate, losses, metrics, preprocess
from faceembed import mesh as meshes
from faceembed.data import augment, pairs, pipeline, sampling, sources
from faceembed.training import step as steps


def train(
    experiment: config.Experiment, run: Path, *, devices: int | None = None, progress: bool = True
) -> dict[str, Any]:
    """Trains, or goes on with the training of a run directory, and ends with verification of report people.

    Args:
      experiment: what to train; a run directory that holds another experiment is refused.
      run: where checkpoints, metrics and results go; made when missing.
      devices: how many devices the batch is divided over; None takes all.
      progress: show progress bars.

    Returns:
      What `results.json` holds: the verification table and where it came from.

    Raises:
      ValueError: the batch does not divide over the devices, the source has too few people, or the run differs.
      BlockingIOError: another process trains in the run directory.
    """
    started = time.perf_counter()
    if experiment.precision == "float64":
        jax.config.update("jax_enable_x64", True)
    pre, batch, schedule = experiment.preprocess, experiment.batch, experiment.schedule
    mesh = meshes.make_mesh(devices)
    meshes.check_batch(mesh, batch.people, batch.photos)
    with checkpoint.locked(run), checkpoint.Checkpoints(run, experiment.checkpoint.keep_best) as checkpoints:
        checkpoint.check_same(run, experiment)
        checkpoint.write_text(run / "config.json", config.to_json(experiment))

        # ---- data: photos, people split once, the P×K plan ---------------------------------------------------------
        photos = open_data(experiment.data, size=pre.size, seed=experiment.seed)
        people_of = evaluate.split_photos(photos)
        learn = people_of["train"]
        sampler = sampling.make_sampler(
            learn.identity, people=batch.people, photos=batch.photos, seed=experiment.seed, singletons=batch.singletons
        )
        select = _Select.read(people_of["select"], pre, experiment.seed, progress)
        about = {
            "source": photos.source,
            "fingerprint": photos.fingerprint,
            "photos": len(learn),
            "people": len(learn.people),
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

        # ---- where an earlier command stopped ----------------------------------------------------------------------
        first = checkpoints.latest or 0
        if first:
            state = checkpoints.restore(state)
            where = "complete at" if first == experiment.steps else "going on from"
            print(f"{run}: {where} step {first} of {experiment.steps}")
        log = MetricsLog(run / "metrics.jsonl", first)
        record_environment(run, mesh)

        # ---- the loop ----------------------------------------------------------------------------------------------
        host = pipeline.batches(
            learn, sampler, size=pre.size, margin=experiment.data.margin, start_step=first, steps=experiment.steps,
            process=jax.process_index(), processes=jax.process_count(),
            memory_limit_bytes=experiment.data.memory_gb * 1e9, progress=progress,
        ) if first < experiment.steps else iter(())  # fmt: skip
        bar = tqdm(total=experiment.steps, initial=first, unit="step", disable=not progress, smoothing=0.05)
        pending: list[dict[str, jax.Array]] = []
        clock, timed = time.perf_counter(), 0
        for number, moved in enumerate(meshes.to_devices(host, mesh), start=first + 1):
            state, measured = update(state, moved)
            pending.append(measured)
            timed += sampler.size
            bar.update()
            if number == first + 1:
                jax.block_until_ready(measured)
                tqdm.write(f"first step {time.perf_counter() - started:.1f} s after the start")
                clock, timed = time.perf_counter(), 0
            last = number == experiment.steps
            if number % experiment.checkpoint.log == 0 or last:
                means = _means(pending)  # the only place where the host waits for the device
                rate = timed / max(time.perf_counter() - clock, 1e-9)
                log.write(number, {**means, "learning_rate": float(learning_rate(number - 1)), "images_per_s": rate})
                bar.set_postfix_str(f"loss {means['loss']:.4f}, active {means.get('active', 1):.0%}, {rate:.0f} img/s")
                if means["skipped"]:
                    tqdm.write(f"step {number}: {means['skipped']:.0f} updates were not finite and not applied so far")
                pending, clock, timed = [], time.perf_counter(), 0
            if number % experiment.checkpoint.every == 0 or last:
                score = select.auc(embed_fn, state.ema)
                log.write(number, {"select_auc": score})
                checkpoints.save(state, experiment, about, score)
                tqdm.write(f"step {number}: AUC {score:.4f} on pairs of {select.people} select people")
                clock, timed = time.perf_counter(), 0
        bar.close()
    # ---- verification of people nobody has looked at so far ----------------------------------------------------------
    return evaluate.final_report(run, people_of, experiment.seed, progress=progress)


def open_data(data: config.Data, *, size: int, seed: int) -> sources.Photos:
    """The source an experiment names. Synthetic photos are drawn in the encoder's size, so that none is resized."""
    if data.source != "synthetic":
        return sources.open_source(data.source, data_dir=data.data_dir)
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
    def read(cls, photos: sources.Photos, pre: preprocess.Preprocess, seed: int, progress: bool) -> "_Select":
        chosen = pairs.heldout(photos, "select", seed=seed)
        first, second = pairs.resolve(chosen, photos)
        crops = pipeline.decode_all(photos, pre.size, progress=progress)
        return cls(crops, first, second, chosen.same, len(photos.people))

    def auc(self, embed_fn: embed.EmbedFn, variables: Any) -> float:
        emb = embed.embed_all(embed_fn, variables, self.crops)
        distance = ((emb[self.first].astype(np.float64) - emb[self.second]) ** 2).sum(1)
        # A diverged network must not end the run: it is merely never the best.
        return metrics.auc(-distance, self.same) if np.isfinite(distance).all() else 0.0


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
        checkpoint.write_text(path, "".join(kept))
        self._path = path

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line. A value that is not finite is written as null, since JSON has no NaN."""
        row = {"step": step, **{name: value if np.isfinite(value) else None for name, value in values.items()}}
        with open(self._path, "a") as file:
            file.write(json.dumps(row) + "\n")


def record_environment(run: Path, mesh: Any) -> None:
    """Writes what a bit-exact resume depends on to environment.json, and says what changed since the last command."""
    now = {
        "jax": jax.__version__,
        "jaxlib": jax.lib.__version__,
        "python": platform.python_version(),
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.devices.size,
        "processor": platform.machine(),
    }
    path = run / "environment.json"
    before = json.loads(path.read_text()) if path.exists() else now
    changed = [f"{name} {before.get(name)} → {value}" for name, value in now.items() if before.get(name) != value]
    if changed:
        print(f"note: {', '.join(changed)}: the run goes on, but not bit for bit as it would have.")
    checkpoint.write_text(path, json.dumps(now, indent=1) + "\n")

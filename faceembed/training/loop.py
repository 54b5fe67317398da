"""The training loop, on one screen: `train` reads from top to bottom."""

import collections
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from faceembed import (
    checkpoint,
    config,
    embed,
    evaluate,
    losses,
    margin_softmax,
    metrics,
    preprocess,
    processes,
    report,
)
from faceembed import mesh as meshes
from faceembed.data import augment, crops, pairs, pipeline, sampling, sources
from faceembed.training import diagnostics, interrupts, logs, transfer
from faceembed.training import step as steps

AHEAD = 8
"""Updates that the host may be ahead of the device: enough to keep it busy, few enough for their batches to fit."""


def train(
    experiment: config.Experiment,
    run: Path,
    *,
    devices: int | None = None,
    shard_optimizer: bool = False,
    skip_bad_steps: int = 20,
    skip_bad_photos: int = 10,
    profile: tuple[int, int] | None = None,
    wandb: str | None = None,
    command: str | None = None,
    progress: bool = True,
    started: float | None = None,
) -> dict[str, Any] | None:
    """Trains, or goes on with the training of a run directory, and ends with verification of report people.

    Args:
      experiment: what to train; a run directory that holds another experiment is refused.
      run: where checkpoints, metrics and results go; made when missing.
      devices: how many devices the batch is divided over; None takes all.
      shard_optimizer: divide the optimizer's state and the averages over the devices, see `mesh.state_sharding`.
      skip_bad_steps: more updates than this that are not finite end the run with an error.
      skip_bad_photos: photos of training people that do not decode any more are replaced by others of the person, those of
        held-out people are left out of what is compared; more than this of either end the run with an error.
      profile: (first, last) update to trace with JAX's profiler, into RUN/profile.
      wandb: project on Weights & Biases to log to, too.
      command: what was typed, for the report.
      progress: show progress bars.
      started: `time.perf_counter()` when the command was given, for the time to the first step; now when not given.

    Returns:
      What `results.json` holds: the verification table and where it came from; None in all processes but the first.

    Raises:
      ValueError: the batch does not divide over the devices, the source has too few people, or the run differs; of
        several processes one was started otherwise, has other photos or another run directory.
      FloatingPointError: more than `skip_bad_steps` updates were not finite; the last good checkpoint is named.
      BlockingIOError: another process trains in the run directory.
      OSError: the last checkpoint could not be saved.
      interrupts.Stopped: a signal asked for it; everything is saved, and the final report is still to come.
    """
    started = time.perf_counter() if started is None else started
    leads = jax.process_index() == 0  # it alone evaluates, and writes all but checkpoints
    progress, profile = progress and leads, profile if leads else None
    if wandb:
        logs.import_wandb()  # what is missing is told before an hour of reading photos
    if experiment.precision == "float64":
        jax.config.update("jax_enable_x64", True)
    pre, batch, schedule = experiment.preprocess, experiment.batch, experiment.schedule
    mesh = meshes.make_mesh(devices)
    chunked = {"microbatches": batch.microbatches, "accumulate": batch.accumulate}
    meshes.check_batch(mesh, batch.people, batch.photos, **chunked)
    if isinstance(experiment.loss, config.CosFace | config.ArcFace):
        margin_softmax.check_devices(mesh.shape[meshes.DATA])
    encoder = embed.build_encoder(experiment)
    # A size that the encoder cannot take is told before photos are read.
    images = jnp.zeros((1, pre.size, pre.size, 3), jnp.float32)
    shapes = jax.eval_shape(lambda key: encoder.init(key, images, train=False), jax.random.key(0))
    frozen = transfer.frozen_by(experiment.freeze, shapes["params"]) if experiment.freeze else None
    if (chunks := max(chunked.values())) > 1 and transfer.norms_by_batch(shapes, frozen):
        at_once = batch.people * batch.photos // chunks
        if at_once < 2:
            name = "microbatches" if batch.microbatches > 1 else "accumulate"
            fewer = max(n for n in range(1, chunks) if chunks % n == 0)
            raise ValueError(
                f"batch.{name} is {chunks}: batch normalisation would see one photo at a time, of which it leaves 0. "
                f"Try --batch.{name} {fewer}, or with --init also --freeze '*bn*', which holds the norms."
            )
        print(f"note: batch normalisation sees {at_once} photos at a time, and not the {at_once * chunks} of a batch.")
    by_layer = None
    if experiment.freeze or experiment.layer_rates:
        rates = transfer.rates_by(experiment.layer_rates, shapes["params"])
        by_layer = transfer.scale_by_layer(rates, frozen or (lambda name: False))
    if pre.template != "portrait" and experiment.data.margin > crops.CANVAS:
        raise ValueError(
            f"data.margin is {experiment.data.margin}: photos aligned as they are read are drawn {crops.CANVAS} times as "
            f"large as a crop. Try --data.margin {crops.CANVAS}."
        )
    exclude = experiment.data.exclude
    lines = sources.read_keys(exclude) if exclude else []
    with checkpoint.locked(run) if leads else contextlib.nullcontext():
        if leads:
            for line in checkpoint.set_aside_damaged(run):
                print(line)
        processes.require_shared(run)  # the others wait here until the first one has the lock
        processes.require_same("flags", {**_shared(experiment), "shard_optimizer": shard_optimizer, "devices": devices})
        checkpoint.check_same(run, experiment)
        # A start that does not fit is told before photos are read; a run that goes on asks nothing of it any more.
        origin = open_origin(experiment, shapes) if experiment.init and not checkpoint.started(run) else None

        # ---- data: photos, people split once, the P×K plan ---------------------------------------------------------
        opened = open_data(experiment.data, size=pre.size, seed=experiment.seed, progress=progress)
        photos = crops.framed_for(opened, pre)
        for line in sources.problem_lines(photos):
            print(line)
        people_of = evaluate.split_photos(opened)
        learn = crops.framed_for(people_of["train"], pre)
        # Also of those people whom only the report at the end compares: it may come days later.
        tested = evaluate.leave_out_bad(people_of, skip_bad_photos, progress=progress)[0] if leads else people_of
        everything = len(learn)
        learn, content = leave_out(sources.named(lines, photos, exclude or ""), photos, learn)
        if exclude:
            print(f"{exclude}: {everything - len(learn):,} of {everything:,} photos of training people are left out")
        sampler = sampling.make_sampler(
            learn.identity, people=batch.people, photos=batch.photos, seed=experiment.seed, singletons=batch.singletons
        )
        select = _Select.read(crops.framed_for(tested["select"], pre), pre, progress) if leads else None
        chosen = len(tested["select"].people)
        hashes = [evaluate.person_hash(person) for person in learn.people]
        about: dict[str, Any] = {
            "source": photos.source,
            "fingerprint": content,
            "photos": len(learn),
            "people": len(learn.people),
            "problems": len(photos.problems),
            "excluded": everything - len(learn),
            "people_hashes": hashes,
        }

        # Also, no process starts with what follows long before the others can.
        processes.require_same("photos", {"source": photos.source, "photos": len(learn), "fingerprint": content})

        # ---- encoder, loss, optimizer, state -----------------------------------------------------------------------
        loss, loss_params = make_loss(experiment, classes=len(learn.people), mesh=mesh)
        optimizer, learning_rate = steps.make_optimizer(
            _rule(experiment.optimizer), learning_rate=schedule.learning_rate, warmup=schedule.warmup,
            steps=experiment.steps, weight_decay=schedule.weight_decay, clip_norm=schedule.clip_norm, by_layer=by_layer,
        )  # fmt: skip
        dtype = jnp.float64 if experiment.precision == "float64" else jnp.float32
        state = steps.init_state(
            encoder, optimizer, seed=experiment.seed, size=pre.size, loss_params=loss_params, dtype=dtype,
            memory=make_memory(experiment, dtype),
        )  # fmt: skip
        shardings = meshes.state_sharding(mesh, state, shard_optimizer=shard_optimizer)
        state = jax.device_put(state, shardings)
        update = steps.make_train_step(
            encoder, loss, optimizer, make_views(experiment), seed=experiment.seed, ema=schedule.ema, mesh=mesh,
            shardings=shardings, frozen=frozen, **chunked,
        )  # fmt: skip
        embed_fn = embed.make_embed(encoder, pre)

        if schedule.warmup >= experiment.steps:
            print(f"note: a warm-up of {schedule.warmup} steps ends with the run; --schedule.warmup 0 turns it off.")
        with checkpoint.Checkpoints(run, experiment.checkpoint.keep_best) as checkpoints:
            # ---- where an earlier command stopped ------------------------------------------------------------------
            first = checkpoints.latest or 0
            processes.require_same("checkpoints", {"step": first})  # of a directory whose listing a host may remember
            if experiment.init:
                if origin is None:
                    about["init"] = checkpoints.data["init"]
                else:
                    state, about["init"] = start_from(origin, experiment.init, state)
                    state = jax.device_put(state, shardings)
                    print("\n  afresh: ".join([f"starts from {experiment.init}", *about["init"]["afresh"]]))
                    for note in about["init"]["notes"]:
                        print(f"note: {note}")
                # Whom the first network saw was seen by this one, too.
                about["people_hashes"] = sorted({*hashes, *about["init"]["people_hashes"]})
            if first:
                checkpoints.check_data(about, run)
                state = checkpoints.restore(state)
                where = "complete at" if first == experiment.steps else "going on from"
                print(f"{run}: {where} step {first} of {experiment.steps}")
            if profile and not first < profile[0] <= profile[1] <= experiment.steps:
                raise ValueError(
                    f"--profile {profile[0]}:{profile[1]} does not lie in the updates to come, {first + 1} to "
                    f"{experiment.steps}. Try --profile {first + 10}:{first + 12}."
                )
            # From here on the directory holds a run of this experiment; nothing before has written to it.
            if leads:
                report.write_text(run / "config.json", config.to_json(experiment))
                record_environment(run, mesh)

            known = checkpoints.data.get("bad_photos", []) if first else []
            stand_ins = pipeline.StandIns(learn, skip_bad_photos, known)

            def bad_photos(number: int) -> list[str]:
                """Those of all processes: each reads its share, and one alone tells and writes them down."""
                for found in processes.from_all("bad photos", stand_ins.found(number)):
                    for at, index, why in found:
                        stand_ins.failed({index: why}, at)
                journal.tell(number)
                return stand_ins.keys(number)

            # ---- the loop ------------------------------------------------------------------------------------------
            host = pipeline.batches(
                learn, sampler, size=pre.size, margin=experiment.data.margin, start_step=first, steps=experiment.steps,
                process=jax.process_index(), processes=jax.process_count(), stand_ins=stand_ins,
                memory_limit_bytes=experiment.data.memory_gb * 1e9, progress=progress,
            ) if first < experiment.steps else iter(())  # fmt: skip
            bar = progress_bar(experiment.steps, first, progress)
            stop = interrupts.Interrupts()
            with bar, stop, logs.open_logs(run, first, wandb=wandb, config=_plain(experiment), writes=leads) as log:
                journal = _Journal(
                    log, bar, make_watch(experiment, log.ongoing), learning_rate, skip_bad_steps, checkpoints, stand_ins
                )
                running: collections.deque[jax.Array] = collections.deque()
                span = _Span.of_rows(first, checkpoints.data.get("row", []) if first else [])
                number, stopping = first, False
                for number, moved in enumerate(meshes.to_devices(host, mesh), start=first + 1):
                    if profile and number == profile[0]:
                        # Without frames of Python: hooking into threads that a save is just ending can crash.
                        options = jax.profiler.ProfileOptions()
                        options.python_tracer_level = 0
                        jax.profiler.start_trace(str(run / "profile"), profiler_options=options)
                    state, measured = update(state, moved)
                    span.metrics.append(measured)
                    running.append(measured["loss"])
                    if len(running) > AHEAD:
                        running.popleft().block_until_ready()  # an update AHEAD back: the device has more to do
                    if number == first + 1:
                        jax.block_until_ready(measured)
                        tqdm.write(f"first step done {time.perf_counter() - started:.1f} s after the command")
                        running.clear()
                        bar.unpause()  # or the time to compile would be in the time left
                        span.clock, span.finished = time.perf_counter(), number
                    bar.update()
                    stopping = stop.should_stop(number)
                    if profile and profile[0] <= number <= profile[1] and (stopping or number == profile[1]):
                        jax.block_until_ready(state)
                        updates = f"profile of updates {profile[0]} to {number}"
                        try:
                            jax.profiler.stop_trace()
                            tqdm.write(f"{updates}: {run / 'profile'}")
                        except RuntimeError as error:  # a full disk, as a rule: the training is worth more
                            tqdm.write(f"{updates}: not written, and the training goes on: {error}")
                    save = number % experiment.checkpoint.every == 0 or number == experiment.steps
                    # A save ends a row of the log, so that a run that goes on from it writes the rows it would have
                    # written.
                    if number % experiment.checkpoint.log == 0 or save:
                        journal.close(span, number, finished=number - len(running), batch=sampler.size)
                        span = _Span(number + 1, finished=number - len(running))
                    if save:
                        journal.flush()
                        running.clear()
                        ema = meshes.gathered(mesh, state.ema)
                        score = processes.from_first("score", select.auc(embed_fn, ema) if select else None)
                        log.write(number, {"select_auc": score})
                        checkpoints.save(state, experiment, {**about, "bad_photos": bad_photos(number)}, score)
                        tqdm.write(f"step {number}: AUC {score:.4f} on pairs of {chosen} select people")
                        span = _Span(number + 1, finished=number)
                    if stopping:
                        if not save:  # without a score, since a step that nobody asked for must not become the best
                            journal.flush()
                            so_far = {"bad_photos": bad_photos(number), "row": span.rows()}
                            checkpoints.save(state, experiment, {**about, **so_far})
                        checkpoints.wait()
                        break
        if stopping:
            raise stop.stopped(number)

        # ---- verification of people nobody has looked at so far ----------------------------------------------------
        if not leads:
            return None
        bad = stand_ins.keys(experiment.steps)  # the last save brought those of all processes together
        return evaluate.final_report(
            run, people_of, bad_photos=bad, skip_bad_photos=skip_bad_photos, progress=progress, command=command
        )


def open_origin(experiment: config.Experiment, shapes: Any) -> embed.Embedder:
    """The checkpoint that `experiment.init` names.

    Args:
      shapes: {"params", "batch_stats"} that this experiment's encoder has, abstract.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: it has another encoder or other layers, or its photos are read otherwise.
    """
    assert experiment.init is not None
    origin = embed.load(experiment.init)
    here, there = experiment.preprocess, origin.preprocess
    other = [name for name in ("template", "mean", "scale", "colour") if getattr(here, name) != getattr(there, name)]
    if other:
        differences = ", ".join(f"preprocess.{name} = {getattr(there, name)!r}" for name in other)
        flags = " ".join(f"--preprocess.{name} {_typed(getattr(there, name))}" for name in other)
        raise ValueError(
            f"--init {experiment.init} reads photos with {differences}, and this experiment has "
            f"{', '.join(repr(getattr(here, name)) for name in other)}: its layers would see other numbers. Try {flags}."
        )
    names = config.encoder_name(origin.config.encoder), config.encoder_name(experiment.encoder)
    if names[0] != names[1]:
        raise ValueError(
            f"--init {experiment.init} holds a {names[0]}, and this experiment trains a {names[1]}. Try --encoder "
            f"{names[0]}."
        )
    transfer.require_alike(shapes, origin.variables)
    return origin


def start_from(origin: embed.Embedder, name: str, state: steps.TrainState) -> tuple[steps.TrainState, dict[str, Any]]:
    """A fresh state whose encoder starts from another's layers.

    Args:
      origin: as `open_origin` gives it.
      name: what it was called by.
      state: fresh.

    Returns:
      (state, JSON-able facts: checkpoint, its fingerprint, what it was trained on and started from itself, its notes,
      layers that start afresh).

    Raises:
      ValueError: it has other layers.
    """
    fresh = {"params": state.params["encoder"], "batch_stats": state.batch_stats}
    variables, afresh = transfer.taken_over(fresh, origin.variables)
    state = dataclasses.replace(
        state,
        params={**state.params, "encoder": variables["params"]},
        batch_stats=variables["batch_stats"],
        ema=jax.tree.map(jnp.array, variables),  # buffers of its own: a donated one may appear only once
    )
    return state, {
        "checkpoint": name,
        "fingerprint": checkpoint.fingerprint(origin.variables),
        "source": origin.data.get("source"),
        "people": origin.data.get("people"),
        "people_hashes": list(origin.data.get("people_hashes", ())),
        "notes": list(origin.data.get("notes", ())),
        "afresh": afresh,
        "init": origin.data.get("init"),
    }


def _plain(experiment: config.Experiment) -> dict[str, Any]:
    return json.loads(config.to_json(experiment))


def _shared(experiment: config.Experiment) -> dict[str, Any]:
    """What all processes must have alike; where photos lie on a host, and how much memory it has, is its own."""
    data = dataclasses.replace(experiment.data, data_dir=None, memory_gb=1.0, exclude=None)
    return _plain(dataclasses.replace(experiment, data=data))


def _typed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def open_data(data: config.Data, *, size: int, seed: int, progress: bool = True) -> sources.Photos:
    """The source an experiment names. Synthetic photos are drawn in the encoder's size, so that none is resized."""
    if data.source != "synthetic":
        return sources.open_source(data.source, data_dir=data.data_dir, progress=progress)
    return sources.open_source("synthetic", people=data.people, photos=data.photos, seed=seed, size=size)


def leave_out(named: np.ndarray, photos: sources.Photos, learn: sources.Photos) -> tuple[sources.Photos, str]:
    """Training people without some photos, and a fingerprint that tells this from training on all of them.

    Args:
      named: [n] bool, which of `photos` are left out; those of other people stay.
      photos: of everybody.
      learn: of training people.
    """
    kept = np.ones(len(learn), bool)
    kept[list(sources.located(photos.keys[named].tolist(), learn).values())] = False
    if kept.all():
        return learn, photos.fingerprint
    return sources.select(learn, kept), sources.fingerprint_of(learn.keys[~kept], learn.people, photos.fingerprint)


def make_loss(
    experiment: config.Experiment, *, classes: int | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[steps.LossFn, Any]:
    """An experiment's loss as (see `steps.LossFn`, its initial parameters).

    A triplet loss also measures, for each row of the log, the share of active triplets that other miners would find.

    Args:
      experiment: names the loss.
      classes: training people; only losses with a class kernel need it, and
      mesh: over which its rows are divided.
    """
    loss = experiment.loss
    match loss:
        case config.Triplet():
            return _triplet(loss, total=experiment.steps, log=experiment.checkpoint.log), {}
        case config.Contrastive():
            return lambda emb, identity, _, __, ___, ____, axis: losses.contrastive_loss(
                emb, identity, margin=loss.margin, axis_name=axis
            ), {}
        case config.PairLogistic():
            return lambda emb, identity, params, _, __, ___, axis: losses.pair_logistic_loss(
                emb, identity, params, axis_name=axis
            ), losses.init_pair_logistic(experiment.encoder.dim)
        case config.CosFace() | config.ArcFace():
            if classes is None or mesh is None:
                raise ValueError(f"{type(loss).__name__} has a row for each training person: give classes and mesh.")
            people, kind = classes, "cosface" if isinstance(loss, config.CosFace) else "arcface"
            kernel = margin_softmax.init_class_kernel(people, experiment.encoder.dim, seed=experiment.seed, mesh=mesh)
            return lambda emb, identity, params, _, key, __, axis: margin_softmax.margin_softmax_loss(
                emb, identity, params[meshes.CLASS_KERNEL], classes=people, kind=kind, key=key, axis_name=axis,
                **dataclasses.asdict(loss),
            ), {meshes.CLASS_KERNEL: kernel}  # fmt: skip


def make_memory(experiment: config.Experiment, dtype: Any = jnp.float32) -> losses.Memory | None:
    """The empty memory of an experiment's loss; None where it has none."""
    loss = experiment.loss
    if not isinstance(loss, config.Triplet) or not loss.memory:
        return None
    return losses.init_memory(loss.memory, experiment.encoder.dim, dtype)


def _triplet(loss: config.Triplet, *, total: int, log: int) -> steps.LossFn:
    last_part = total - round(loss.last_share * total)

    def triplet(emb: jax.Array, identity: jax.Array, _: Any, memory: Any, key: jax.Array, step: jax.Array, axis: Any):
        if memory is not None:
            memory = memory._replace(filled=memory.filled & (step >= loss.memory_after))
        options: dict[str, Any] = {"margin": loss.margin, "axis_name": axis, "key": key, "tile": loss.tile}
        batch: Any
        mine: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
        if loss.groups == 1:
            # Gathered once for all that mine: what follows differs in what it does with the same embeddings.
            batch = losses.gather(emb, identity, axis)
            mine = partial(losses.gathered_triplet_loss, memory=memory, **options)
        else:
            batch = emb, identity
            mine = lambda batch, miner: losses.grouped_triplet_loss(  # noqa: E731
                *batch, groups=loss.groups, miner=miner, **options
            )

        def mined(miner: str) -> Callable[[Any], tuple[jax.Array, dict[str, jax.Array]]]:
            return lambda batch: mine(batch, miner=miner)

        if loss.last_miner in (None, loss.miner):
            value, measured = mined(loss.miner)(batch)
        else:
            value, measured = jax.lax.cond(step < last_part, mined(loss.miner), mined(loss.last_miner), batch)
        share = partial(diagnostics.active_by_miner, mine)
        shares = jax.eval_shape(share, batch)
        unknown = lambda batch: jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), shares)  # noqa: E731
        # Three miners cost more than one: only for the update whose row is logged.
        return value, {**measured, **jax.lax.cond((step + 1) % log == 0, share, unknown, jax.lax.stop_gradient(batch))}

    return triplet


def make_watch(experiment: config.Experiment, ongoing: Sequence[str] = ()) -> diagnostics.Watch:
    """What looks out for an experiment's failures."""
    dim = experiment.encoder.dim
    if isinstance(loss := experiment.loss, config.Triplet):
        return diagnostics.Watch(dim=dim, margin=loss.margin, miner=loss.miner, ongoing=ongoing)
    return diagnostics.Watch(dim=dim, ongoing=ongoing)


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

    @classmethod
    def read(cls, photos: sources.Photos, pre: preprocess.Preprocess, progress: bool) -> "_Select":
        chosen = pairs.heldout(photos, "select")
        # Of a twentieth of ten million photos only thousands are in pairs.
        used, place = np.unique(np.stack(pairs.resolve(chosen, photos)), return_inverse=True)
        images = pipeline.decode_all(sources.select(photos, used), pre.size, progress=progress)
        first, second = place.reshape(2, -1)
        return cls(images, first, second, chosen.same)

    def auc(self, embed_fn: embed.EmbedFn, variables: Any) -> float:
        emb = embed.embed_all(embed_fn, variables, self.crops)
        distance = ((emb[self.first].astype(np.float64) - emb[self.second]) ** 2).sum(1)
        # A diverged network must not end the run: it is merely never the best.
        return metrics.auc(-distance, self.same) if np.isfinite(distance).all() else 0.0


def progress_bar(total: int, first: int, shown: bool) -> tqdm:
    """A bar of steps with images/s and the time left; in a log file it adds a line each half minute."""
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(total=total, initial=first, unit="step", disable=not shown, smoothing=0.05, mininterval=interval)


@dataclasses.dataclass
class _Span:
    """The updates of one row of the log; their metrics are still on the device."""

    first: int
    finished: int
    """Updates that the device was known to have finished when the clock started: it may be AHEAD behind."""
    clock: float = dataclasses.field(default_factory=time.perf_counter)
    metrics: list[Any] = dataclasses.field(default_factory=list)
    last: int = 0
    images_per_s: float = float("nan")

    @classmethod
    def of_rows(cls, last: int, rows: list[dict[str, float]]) -> "_Span":
        """A row that `rows()` of an earlier command began: those of the updates up to `last`."""
        return cls(last + 1 - len(rows), finished=last, metrics=list(rows))

    def rows(self) -> list[dict[str, float]]:
        """The metrics as JSON can hold them, to the last bit; waits for the device."""
        return [{name: float(x) for name, x in row.items()} for row in jax.device_get(self.metrics)]


@dataclasses.dataclass
class _Journal:
    """Writes rows of the log one row late: by then the device has long computed them, and nobody waits for it."""

    log: logs.Logs
    bar: tqdm
    watch: diagnostics.Watch
    learning_rate: Callable[[int], Any]
    skip_bad_steps: int
    checkpoints: checkpoint.Checkpoints
    stand_ins: pipeline.StandIns
    waiting: _Span | None = None

    def close(self, span: _Span, last: int, *, finished: int, batch: int) -> None:
        """Ends a span with the update `last`, when `finished` updates are, and writes the row of the span before."""
        span.last = last
        timed = finished - span.finished
        span.images_per_s = timed * batch / (time.perf_counter() - span.clock) if timed > 0 else float("nan")
        self.flush()
        self.waiting = span
        self.tell(last)
        for failure in self.checkpoints.failures():
            self._event(last, "not saved", f"{failure} The training goes on, and tries again at the next save.")

    def tell(self, last: int) -> None:
        """Tells of photos that failed and were needed for an update up to `last`."""
        for at, why in self.stand_ins.news(last):
            self._event(at + 1, "bad photo", f"{why}; a photo of the same person is shown in its place from here on.")

    def _event(self, step: int, kind: str, message: str) -> None:
        self.log.event(step, kind, message)
        tqdm.write(f"step {step}: {message}")

    def flush(self) -> None:
        """Writes the row that waits, if any.

        Raises:
          FloatingPointError: too many updates were not finite.
        """
        span, self.waiting = self.waiting, None
        if span is None:
            return
        rows = jax.device_get(span.metrics)
        skipped = int(rows[-1]["skipped"])
        rate = float(self.learning_rate(span.last - 1 - skipped))
        row = {**diagnostics.means(rows), "skipped": skipped, "learning_rate": rate, "images_per_s": span.images_per_s}
        self.log.write(span.last, {**row, **memory()})
        active = f", active {row['active']:.0%}" if "active" in row else ""
        self.bar.set_postfix_str(f"loss {row['loss']:.4f}{active}, {span.images_per_s:.0f} img/s")
        for event in self.watch.read(span.first, rows, rate):
            self._event(event.step, event.kind, event.message)
        if skipped > self.skip_bad_steps:
            good = self.checkpoints.latest
            where = f"The last good checkpoint is that of step {good}." if good else "There is no checkpoint yet."
            raise FloatingPointError(
                f"{skipped} updates up to step {span.last} were not finite and not applied, more than --skip-bad-steps "
                f"{self.skip_bad_steps}. {where} events.jsonl in the run directory says what was not finite. Try a lower "
                "--schedule.learning-rate in another --run-dir, or go on from there with a larger --skip-bad-steps."
            )


def memory() -> dict[str, float]:
    """device_memory_gb: the most a local device has had in use, where its back end counts. host_memory_gb: resident now."""
    values = {}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    if peaks:
        values["device_memory_gb"] = max(peaks) / 1e9
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        values["host_memory_gb"] = pages * os.sysconf("SC_PAGE_SIZE") / 1e9
    except OSError:
        pass  # no /proc on this system
    return values


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
        "processes": jax.process_count(),
        "processor": processor(),
        "deterministic": "xla_gpu_deterministic_ops=true" in os.environ.get("XLA_FLAGS", ""),
    }
    path = run / "environment.json"
    before = {"processes": 1, **json.loads(path.read_text())} if path.exists() else now
    changed = [f"{name} {before.get(name)} → {value}" for name, value in now.items() if before.get(name) != value]
    if changed:
        print(f"note: {', '.join(changed)}: the run goes on, but not bit for bit as it would have.")
    report.write_text(path, json.dumps(now, indent=1) + "\n")

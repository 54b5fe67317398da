"""How much does mining over all devices matter, by batch per device?  (About 40 minutes on two idle cores.)

    python launch.py data prepare celeba …  and  lfw …, with peopleDevTest.txt
    python -m experiments.global_vs_local_mining [--seeds 0 1 2 3 4] [--quick]

A loss can gather the embeddings of all devices before triplets are mined, or leave each device to mine what it has and
average the gradients. Both are trained here, on 8 virtual devices, from the same parameters, on the same photographs in the
same order with the same augmentation: within a pair of runs only `loss.groups` differs, 1 against 8.

Fixed before a result was looked at:

- Trained on the training people of CelebA with two photos or more, two photos each (K = 2: with more, people who have
  fewer would be torn apart by the borders between devices), on BATCHES photos a device, PHOTOS photos in all whatever the
  batch: a batch twice as large has half as many updates. Semi-hard mining.
- Batch normalisation is over the whole batch in both arms, and both have the same learning rate, which was chosen for
  global mining alone: of RATES the one with the highest AUC on CelebA's select people, at 16 photos a device and with a
  seed that is not among the results' (`--rates`: 0.822 at 2e-3, 0.830 at 4e-3; with Augment()'s usual strength 0.770,
  0.781 and 0.786 at 1e-3, 2e-3 and 4e-3).
- Measured: all pairs of the people of LFW's peopleDevTest; no run sees a photo of LFW. Primary: the AUC, every person's
  genuine pairs weighing the same together; secondary: TAR at FMR 1 %, weighted alike, and the same AUC of CelebA's report
  people. The last update's averaged parameters are measured: there is no choice of a step.
- Difference: global minus local, paired by seed. Two 95 % intervals: the one over seeds, Student's t with as many degrees
  of freedom as there are seeds less one, says what other seeds would give on these test people; the other adds the
  variance over test people of the mean difference (the infinitesimal jackknife of people's weights).
- Seeds 0 to 4. More are added, if at all, for all batches alike.

With 15,974 photos of 5,561 people of CelebA, points of AUC and the interval over seeds: +1.95 [1.40, 2.50] at 8 photos a
device, +1.50 [0.94, 2.06] at 16, +0.85 [0.13, 1.57] at 32. docs/triplet-training.md has more.

Finished runs are kept in --runs with their settings and are not made again; one of other settings is refused. The table,
results.json and global_vs_local.svg are made of all that are there.
"""

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata, t

from faceembed import config, plots, report
from faceembed.preprocess import Preprocess

DEVICES = 8
BATCHES = (8, 16, 32)
"""Photos a device."""
SEEDS = (0, 1, 2, 3, 4)
PHOTOS = 48_128
"""Seen by each run, repeats counted."""
RATES = (1e-3, 2e-3, 4e-3)
RATE = 4e-3
TUNING_SEED = 1000
FMR = 0.01
LEVEL = 0.95
ARMS = {"global": 1, "local": DEVICES}
"""What `loss.groups` is."""

BASE = config.Experiment(
    data=config.Data(source="celeba"),
    preprocess=Preprocess(size=32),
    encoder=config.ConvNet(widths=(16, 32, 64, 128), blocks=(1, 1, 1, 1)),
    loss=config.Triplet(miner="semi_hard"),
    # So short a training learns more from photographs that are little changed.
    augment=config.Augment(rotation=5, scale=0.05, colour=0.2, grey=0, erase=0, degrade=0),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training."""

    each: int
    """Photos a device."""
    arm: str
    seed: int
    rate: float = RATE
    photos: int = PHOTOS

    @property
    def name(self) -> str:
        return f"{self.each}-{self.arm}-{self.seed}" + (f"-{self.rate:g}" if self.rate != RATE else "")

    @property
    def experiment(self) -> config.Experiment:
        size = DEVICES * self.each
        steps = self.photos // size
        assert isinstance(BASE.loss, config.Triplet)
        return dataclasses.replace(
            BASE,
            seed=self.seed,
            steps=steps,
            batch=config.Batch(people=size // 2, photos=2, singletons=0),
            loss=dataclasses.replace(BASE.loss, groups=ARMS[self.arm]),
            schedule=config.Schedule(learning_rate=self.rate, warmup=max(1, steps // 10), weight_decay=0.05, ema=0.98),
        )


def settings(run: Run) -> dict[str, Any]:
    """Everything that a run's figures depend on but the photographs; JSON-able, and kept with them."""
    return {**dataclasses.asdict(run), "experiment": json.loads(config.to_json(run.experiment))}


def finished(path: Path, run: Run) -> dict[str, Any] | None:
    """What a finished run left; None where there is no such file.

    Raises:
      ValueError: it is of a run with other settings, whatever its name.
    """
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    require_same(path, {name: found.get(name) for name in settings(run)}, settings(run))
    return found


def require_same(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuses a finished run of other settings.

    Raises:
      ValueError: naming what differs.
    """
    of = [dict(_leaves(dict(settings))) for settings in (there, here)]
    other = [name for name in sorted({*of[0], *of[1]}) if of[0].get(name) != of[1].get(name)]
    if other:
        lines = [f"{name}: {of[0].get(name)!r} there, {of[1].get(name)!r} now" for name in other[:5]]
        lines += [f"and {len(other) - 5} more"] if len(other) > 5 else []
        told = "".join(f"\n  {line}" for line in lines)
        raise ValueError(f"{path} is of a run with other settings:{told}\nMove it away, or give another --runs.")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, f"{name}.{key}" if name else key)


def grid(seeds: Sequence[int], batches: Sequence[int] = BATCHES, photos: int = PHOTOS) -> list[Run]:
    """Seeds outermost, so that a grid that was stopped is balanced."""
    return [Run(each=each, arm=arm, seed=seed, photos=photos) for seed in seeds for each in batches for arm in ARMS]


# ---- what is measured ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """All pairs of a set of photos.

    Attributes:
      auc: mean over the people with two photos of the share of impostor pairs below their genuine pairs, ties a half.
      tar: mean over the same people of the share of their genuine pairs at or above the score that FMR of the impostor
        pairs reach.
      influence: [m] what a person's weight moves the AUC by; their squares add up to its variance over people.
    """

    auc: float
    tar: float
    influence: np.ndarray


def measure(emb: np.ndarray, identity: np.ndarray) -> Measured:
    """Compares every photo with every other.

    Args:
      emb: [n, d] unit length.
      identity: [n] int, 0 to m - 1.
    """
    first, second = np.triu_indices(len(emb), 1)
    score = (emb @ emb.T)[first, second].astype(np.float64)  # float32 scores have float32 ranks in newer SciPy
    same = identity[first] == identity[second]
    genuine, impostor = score[same], score[~same]
    people = int(identity.max()) + 1
    who = identity[first[same]]
    pairs = np.bincount(who, minlength=people)
    weight = 1 / (pairs[who] * np.count_nonzero(pairs))

    # Ranks among all less ranks among its own kind: how many of the other kind lie below, ties counting a half.
    rank = rankdata(score)
    below = (rank[same] - rankdata(genuine)) / len(impostor)
    auc = float(weight @ below)
    order = np.argsort(genuine)
    heavier = np.concatenate([np.cumsum(weight[order][::-1])[::-1], [0.0]])
    above = sum(heavier[np.searchsorted(genuine[order], impostor, side)] for side in ("left", "right")) / 2

    influence = np.bincount(who, weight * (below - auc), people)
    for side in (first[~same], second[~same]):
        influence += np.bincount(identity[side], (above - auc) / len(impostor), people)
    accepted = math.floor(FMR * len(impostor))
    threshold = np.partition(impostor, len(impostor) - accepted - 1)[len(impostor) - accepted - 1]
    return Measured(auc=auc, tar=float(weight @ (genuine > threshold)), influence=influence)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Global minus local mining, paired by seed.

    Attributes:
      value: mean over the seeds.
      seeds: interval over seeds, for these test people.
      people: interval over seeds and test people; None where people are not told.
      each: [s] of each seed.
    """

    value: float
    seeds: tuple[float, float]
    people: tuple[float, float] | None
    each: tuple[float, ...]


def difference(
    whole: Sequence[float], alone: Sequence[float], influence: np.ndarray | None = None, *, level: float = LEVEL
) -> Difference:
    """The paired difference and its intervals.

    Args:
      whole, alone: [s] a figure of each seed with global and with local mining.
      influence: [s, m] influence of people on the first less that on the second; None for no interval over people.
      level: coverage aimed at.

    Raises:
      ValueError: there are fewer than two seeds, or not the same number on both sides.
    """
    if len(whole) != len(alone) or len(whole) < 2:
        raise ValueError(
            f"{len(whole)} and {len(alone)} runs: an interval over seeds takes pairs of runs, two at least. "
            "Try --seeds 0 1 2 3 4."
        )
    each = np.asarray(whole, np.float64) - np.asarray(alone, np.float64)
    value, variance = float(each.mean()), float(each.var(ddof=1)) / len(each)
    quantile = float(t.ppf((1 + level) / 2, len(each) - 1))

    def around(variance: float) -> tuple[float, float]:
        half = quantile * math.sqrt(variance)
        return value - half, value + half

    of_people = None if influence is None else around(variance + float(np.square(influence.mean(axis=0)).sum()))
    return Difference(value=value, seeds=around(variance), people=of_people, each=tuple(each.tolist()))


# ---- table and figure ------------------------------------------------------------------------------------------------


def summary(found: Mapping[str, Mapping[str, Any]], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row a batch, of the seeds of which both runs are there.

    Args:
      found: what `run` returned, by the run's name.
      runs: the grid.
    """
    rows = []
    for each in dict.fromkeys(run.each for run in runs):
        of = {(run.arm, run.seed): found[run.name] for run in runs if run.each == each and run.name in found}
        seeds = sorted(seed for arm, seed in of if arm == "global" and ("local", seed) in of)
        if len(seeds) < 2:
            continue
        figures = {
            (arm, name): [of[arm, seed][name] for seed in seeds]
            for arm in ARMS
            for name in ("auc", "tar", "report_auc", "influence")
        }
        influence = np.array(figures["global", "influence"]) - np.array(figures["local", "influence"])
        experiment = next(run for run in runs if run.each == each).experiment
        rows.append(
            {
                "each": each,
                "batch": each * DEVICES,
                "updates": experiment.steps,
                "seeds": seeds,
                **{arm: {name: float(np.mean(figures[arm, name])) for name in ("auc", "tar", "report_auc")}
                   for arm in ARMS},
                "auc": dataclasses.asdict(difference(figures["global", "auc"], figures["local", "auc"], influence)),
                **{name: dataclasses.asdict(difference(figures["global", name], figures["local", name]))
                   for name in ("tar", "report_auc")},
            }
        )  # fmt: skip
    return rows


def points(of: Mapping[str, Any], interval: str) -> str:
    """A difference in points with an interval of it."""
    low, high = of[interval]
    return f"{100 * of['value']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What is printed."""
    return report.table(
        [
            {
                "photos a device": row["each"],
                "batch": row["batch"],
                "updates": row["updates"],
                "seeds": len(row["seeds"]),
                "AUC local": report.format_percent(row["local"]["auc"]),
                "AUC global": report.format_percent(row["global"]["auc"]),
                "difference, over seeds": points(row["auc"], "seeds"),
                "over seeds and people": points(row["auc"], "people"),
                f"TAR at FMR {100 * FMR:g} %, over seeds": points(row["tar"], "seeds"),
                "CelebA's AUC, over seeds": points(row["report_auc"], "seeds"),
            }
            for row in rows
        ]
    )


def figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """Differences of the AUC: thick over seeds, thin over seeds and test people."""
    estimates = []
    for row in rows:
        of = row["auc"]
        value, low, high, wide_low, wide_high = (100 * x for x in (of["value"], *of["seeds"], *of["people"]))
        estimates.append(
            plots.Estimate(
                name=f"{row['each']} photos a device", value=value, low=low, high=high, wide_low=wide_low,
                wide_high=wide_high,
            )
        )  # fmt: skip
    return plots.forest(
        estimates,
        title="Mining over 8 devices less mining on each alone",
        x_label="difference of the AUC on LFW, points",
    )


# ---- training --------------------------------------------------------------------------------------------------------


class Trainer:
    """Photos in memory, and an update compiled once for each batch and arm, whatever the seed."""

    def __init__(self, progress: bool = True):
        from faceembed import embed, evaluate
        from faceembed import mesh as meshes
        from faceembed.data import pairs, pipeline, sources

        size = BASE.preprocess.size
        people_of = evaluate.split_photos(sources.open_source("celeba", progress=progress))
        self.learn = people_of["train"]
        self.crops = pipeline.decode_all(self.learn, size, BASE.data.margin, progress=progress)
        tested = {
            "lfw": pairs.load_people("all:lfw:dev_test"),
            **{part: people_of[part] for part in ("select", "report")},
        }
        self.tested = {
            name: (pipeline.decode_all(photos, size, progress=progress), photos.identity)
            for name, photos in tested.items()
        }
        self.mesh = meshes.make_mesh(DEVICES)
        self.encoder = embed.build_encoder(BASE)
        self.embed = embed.make_embed(self.encoder, BASE.preprocess)
        self.fresh: dict[int, Any] = {}
        self.updates: dict[Run, Any] = {}

    def variables(self, run: Run) -> Any:
        """Trains; returns the averaged parameters and batch statistics."""
        import jax
        import jax.numpy as jnp

        from faceembed import mesh as meshes
        from faceembed.data import pipeline, sampling
        from faceembed.training import step as steps

        experiment = run.experiment
        batch = experiment.batch
        sampler = sampling.make_sampler(
            self.learn.identity, people=batch.people, photos=batch.photos, seed=run.seed, singletons=batch.singletons
        )
        optimizer = self._optimizer(experiment)
        if run.seed not in self.fresh:
            # Batches and arms start from the same numbers, and so does the optimizer.
            self.fresh[run.seed] = jax.device_get(
                steps.init_state(
                    self.encoder, optimizer, seed=run.seed, size=BASE.preprocess.size, loss_params={}, dtype=jnp.float32
                )
            )
        shardings = meshes.state_sharding(self.mesh, self.fresh[run.seed])
        state = jax.device_put(self.fresh[run.seed], shardings)
        same = dataclasses.replace(run, seed=0)
        if same not in self.updates:
            self.updates[same] = self._update(experiment, optimizer, shardings)
        host = pipeline.batches(
            self.learn, sampler, size=BASE.preprocess.size, margin=BASE.data.margin, steps=experiment.steps,
            decoded=self.crops,
        )  # fmt: skip
        for number, moved in enumerate(meshes.to_devices(host, self.mesh)):
            state, metrics = self.updates[same](state, moved, run.seed)
            if number % 8 == 0:
                jax.block_until_ready(metrics["loss"])  # batches of the future would fill the memory
        if int(metrics["skipped"]):
            raise FloatingPointError(f"{run.name}: {int(metrics['skipped'])} updates were not finite.")
        return meshes.gathered(self.mesh, state.ema)

    def _optimizer(self, experiment: config.Experiment) -> Any:
        import optax

        from faceembed.training import step as steps

        schedule = experiment.schedule
        return steps.make_optimizer(
            optax.scale_by_adam(), learning_rate=schedule.learning_rate, warmup=schedule.warmup, steps=experiment.steps,
            weight_decay=schedule.weight_decay, clip_norm=schedule.clip_norm,
        )[0]  # fmt: skip

    def _update(self, experiment: config.Experiment, optimizer: Any, shardings: Any) -> Any:
        import jax

        from faceembed import losses, preprocess
        from faceembed import mesh as meshes
        from faceembed.data import augment
        from faceembed.training import step as steps

        loss, pre = experiment.loss, experiment.preprocess
        assert isinstance(loss, config.Triplet)
        options = dataclasses.asdict(experiment.augment)

        def mined(emb: Any, identity: Any, _: Any, __: Any, key: Any, ___: Any, axis: Any) -> Any:
            return losses.grouped_triplet_loss(
                emb, identity, groups=loss.groups, margin=loss.margin, miner=loss.miner, key=key, axis_name=axis
            )

        def update(state: Any, batch: Any, seed: Any) -> Any:
            # The seed is an argument, so that one compilation serves all of them.
            def views(step: Any, slot: Any, images: Any) -> Any:
                keys = augment.slot_keys(seed, step, slot)
                return preprocess.normalize(pre, augment.augment(keys, images, size=pre.size, **options))

            return steps.make_train_step(
                self.encoder, mined, optimizer, views, seed=seed, ema=experiment.schedule.ema, mesh=self.mesh,
                shardings=shardings,
            )(state, batch)  # fmt: skip

        sharded = (shardings, meshes.batch_sharding(self.mesh), None)
        return jax.jit(update, donate_argnums=0, in_shardings=sharded, out_shardings=(shardings, None))

    def run(self, run: Run, tested: Sequence[str] = ("lfw", "report")) -> dict[str, Any]:
        """Trains and measures; JSON-able."""
        from faceembed import embed

        variables = self.variables(run)
        of = {name: measure(embed.embed_all(self.embed, variables, crops), who)
              for name, (crops, who) in self.tested.items() if name in tested}  # fmt: skip
        found: dict[str, Any] = {f"{name}_auc": measured.auc for name, measured in of.items()}
        if "lfw" in of:
            lfw = of["lfw"]
            found |= {"auc": found.pop("lfw_auc"), "tar": lfw.tar, "influence": lfw.influence.round(9).tolist()}
        return {**settings(run), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="photos a device, even")
    parser.add_argument("--runs", type=Path, default=Path("runs/global_vs_local"), help="folder of finished runs")
    parser.add_argument("--out", type=Path, default=Path("docs/img"), help="folder of the figure")
    parser.add_argument("--quick", action="store_true", help="two seeds of one batch and a few updates: does it work?")
    parser.add_argument("--rates", action="store_true", help="compare learning rates on select people, and no more")
    flags = parser.parse_args()

    # Before anything imports JAX.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    from faceembed.cli.train import use_compilation_cache

    use_compilation_cache()
    if flags.rates:
        tuned = Trainer()
        for rate in RATES:
            tried = tuned.run(Run(each=16, arm="global", seed=TUNING_SEED, rate=rate), ("select",))
            print(f"learning rate {rate:g}: AUC {tried['select_auc']:.4f} on select people", flush=True)
        return
    runs = grid(flags.seeds, flags.batches)
    if flags.quick:
        runs, flags.runs, flags.out = grid((0, 1), (8,), 640), flags.runs / "quick", flags.runs / "quick"
    path = {run.name: flags.runs / f"{run.name}.json" for run in runs}
    # All that are there are looked at before any is made.
    found = {run.name: kept for run in runs if (kept := finished(path[run.name], run))}
    missing = [run for run in runs if run.name not in found]
    trainer: Trainer | None = Trainer() if missing else None
    for run in missing:
        assert trainer is not None
        made = found[run.name] = trainer.run(run)
        report.write_json(path[run.name], made)
        print(f"{run.name}: AUC {made['auc']:.4f}, TAR {made['tar']:.4f}, CelebA {made['report_auc']:.4f}", flush=True)
    rows = summary(found, runs)
    report.write_json(flags.runs / "results.json", {"rows": rows})
    report.write_text(flags.out / "global_vs_local.svg", figure(rows))
    print(f"\n{table(rows)}\n\nwritten: {flags.runs / 'results.json'}, {flags.out / 'global_vs_local.svg'}")


if __name__ == "__main__":
    main()

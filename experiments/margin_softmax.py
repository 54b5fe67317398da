"""Does triplet training keep up with CosFace and ArcFace on a few thousand CelebA people?  (About an hour on two cores.)

    python launch.py data prepare celeba …  and  lfw …, with peopleDevTest.txt
    python -m experiments.margin_softmax [--seeds 0 1 2] [--steps 400] [--runs runs/margin_softmax]

A network an eighth of the size of `celeba`'s, the same P×K batches, augmentation and schedule for all; only the loss
differs, each margin softmax at its paper's scale and margin and at gentler ones. Fixed before a result was looked at:

- Measured: all pairs of the people of LFW's peopleDevTest; no run sees a photo of LFW. The AUC, every person's genuine
  pairs weighing the same together. The last update's averaged parameters: there is no choice of a step.
- Difference: a loss minus `triplet`, paired by seed, with the two intervals of `global_vs_local_mining`: over seeds, and
  over seeds and people.
- The learning rate is `celeba`'s, which was chosen for triplets; nothing is tuned here for any of the losses.

TAR at FMR 1 %, people weighted alike, was added to the table when six of the runs had been looked at.

A few hundred updates of a small network tell which loss gets somewhere soon, and not which one ends higher: margin softmax
is made for long training on many photos a person, and CelebA has few. docs/losses.md has what came out.

Finished runs are kept in --runs and are not made again; one of another experiment is refused.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import celeba
from experiments.global_vs_local_mining import FMR, difference, measure, points, require_same
from faceembed import config, report
from faceembed.data import pairs, sources

_BASE = dataclasses.replace(
    celeba.EXPERIMENT,
    encoder=config.ConvNet(widths=(8, 24, 48, 96), blocks=(1, 1, 1, 1), dim=128),
    batch=config.Batch(people=24, photos=4),
    schedule=config.Schedule(learning_rate=2e-3, warmup=40, weight_decay=0.05, ema=0.98),
)

REFERENCE = "triplet"
LOSSES: dict[str, config.Loss] = {
    REFERENCE: config.Triplet(margin=0.2, miner="semi_hard"),
    "cosface": config.CosFace(),
    "cosface_gentle": config.CosFace(scale=16.0, margin=0.1),
    "arcface": config.ArcFace(),
    "arcface_gentle": config.ArcFace(scale=16.0, margin=0.1),
}


def runs(steps: int, seeds: Sequence[int]) -> dict[tuple[str, int], config.Experiment]:
    """{(loss, seed): experiment}, seeds outermost, so that a grid that was stopped is balanced."""
    return {
        (name, seed): dataclasses.replace(
            _BASE, steps=steps, seed=seed, loss=loss, checkpoint=config.Checkpoint(every=steps, log=20)
        )
        for seed in seeds
        for name, loss in LOSSES.items()
    }


def finished(folder: Path, experiment: config.Experiment) -> bool:
    """Whether a run has been trained to its end.

    Raises:
      ValueError: it is one of another experiment, whatever its name.
    """
    if not (folder / "results.json").exists():
        return False
    path = folder / "config.json"
    # Fields that a run is older than have their defaults, as when a run goes on.
    there, here = (json.loads(config.to_json(of)) for of in (config.from_json(path.read_text()), experiment))
    require_same(path, there, here)
    return True


def figures(folder: Path, photos: sources.Photos) -> dict[str, Any]:
    """What a finished run's checkpoint gives for people; JSON-able, and kept beside it.

    Returns:
      auc, tar: of all pairs; influence: [m] of the people on the AUC; loss, effective_rank: the log's last.
    """
    path = folder / "lfw.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get("photos") != photos.fingerprint:
        from faceembed import embed, evaluate

        emb, _ = evaluate.embed_photos(embed.load(folder), photos, progress=False)
        found = measure(emb, photos.identity)
        known = {"auc": found.auc, "tar": found.tar, "influence": found.influence.round(9).tolist()}
        report.write_json(path, {"photos": photos.fingerprint, **known})
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in last if "loss" in line][-1]
    return {**known, "loss": logged["loss"], "effective_rank": logged["effective_rank"]}


def summary(found: Mapping[tuple[str, int], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a loss, of the seeds that it and the reference have; differences from two seeds on.

    Args:
      found: {(loss, seed): what `figures` returned}.
    """
    rows = []
    for name in dict.fromkeys(name for name, _ in found):
        seeds = [seed for loss, seed in found if loss == name and (REFERENCE, seed) in found]
        of = [found[name, seed] for seed in seeds]
        row: dict[str, Any] = {
            "loss": name, "seeds": seeds, "AUC": [one["auc"] for one in of], "TAR": [one["tar"] for one in of],
            "effective rank": [one["effective_rank"] for one in of], "last loss": [one["loss"] for one in of],
        }  # fmt: skip
        if name != REFERENCE and len(seeds) > 1:
            reference = [found[REFERENCE, seed] for seed in seeds]
            influence = np.array([one["influence"] for one in of]) - [one["influence"] for one in reference]
            auc, tar = ([one[figure] for one in reference] for figure in ("auc", "tar"))
            row["difference"] = dataclasses.asdict(difference(row["AUC"], auc, influence))
            row["difference of the TAR"] = dataclasses.asdict(difference(row["TAR"], tar))
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What is printed."""
    return report.table(
        [
            {
                "loss": row["loss"],
                "seeds": len(row["seeds"]),
                "AUC": report.format_percent(float(np.mean(row["AUC"]))),
                f"less {REFERENCE}, over seeds": points(row["difference"], "seeds") if "difference" in row else "",
                "over seeds and people": points(row["difference"], "people") if "difference" in row else "",
                f"TAR at FMR {100 * FMR:g} %": report.format_percent(float(np.mean(row["TAR"]))),
                f"TAR less {REFERENCE}, over seeds": (
                    points(row["difference of the TAR"], "seeds") if "difference" in row else ""
                ),
                "effective rank": f"{np.mean(row['effective rank']):.0f}",
            }
            for row in rows
            if row["seeds"]
        ]
    )


def main() -> None:
    from faceembed.training import loop

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--runs", type=Path, default=Path("runs/margin_softmax"), help="finished runs there are kept")
    flags = parser.parse_args()
    grid = runs(flags.steps, flags.seeds)
    folder = {run: flags.runs / "{}-{}".format(*run) for run in grid}
    # All that are there are looked at before any is made.
    missing = [run for run, experiment in grid.items() if not finished(folder[run], experiment)]
    for run in missing:
        loop.train(grid[run], folder[run])
    photos = pairs.load_people("all:lfw:dev_test")
    rows = summary({run: figures(folder[run], photos) for run in grid})
    report.write_json(flags.runs / "results.json", {"steps": flags.steps, "rows": rows})
    print(f"\n{table(rows)}\n\nwritten: {flags.runs / 'results.json'}")


if __name__ == "__main__":
    main()

"""Does triplet training keep up with CosFace and ArcFace on a few thousand CelebA people?

    python launch.py data prepare celeba --archive img_align_celeba.zip --identities identity_CelebA.txt
    python -m experiments.margin_softmax [--seeds 0 1 2] [--steps 400] [--runs runs/margin_softmax]

A network an eighth of the size of `celeba`'s, the same P×K batches, augmentation and schedule for all; only the loss
differs, each margin softmax at its paper's scale and margin and at gentler ones. Printed is the AUC over pairs of report
people, whom no training saw, with its 95 % interval over people, for each seed; intervals of one seed do not hold what
another seed would give. A few hundred updates of a small network tell which loss gets somewhere soon, and not which one
ends higher: margin softmax is made for long training on many photos a person, and CelebA has few.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import celeba
from faceembed import config, report

_BASE = dataclasses.replace(
    celeba.EXPERIMENT,
    encoder=config.ConvNet(widths=(8, 24, 48, 96), blocks=(1, 1, 1, 1), dim=128),
    batch=config.Batch(people=24, photos=4),
    schedule=config.Schedule(learning_rate=2e-3, warmup=40, weight_decay=0.05, ema=0.98),
)

LOSSES: dict[str, config.Loss] = {
    "triplet": config.Triplet(margin=0.2, miner="semi_hard"),
    "cosface": config.CosFace(),
    "cosface_gentle": config.CosFace(scale=16.0, margin=0.1),
    "arcface": config.ArcFace(),
    "arcface_gentle": config.ArcFace(scale=16.0, margin=0.1),
}


def runs(steps: int, seeds: Sequence[int]) -> dict[str, config.Experiment]:
    """{"LOSS-SEED": experiment}."""
    return {
        f"{name}-{seed}": dataclasses.replace(
            _BASE, steps=steps, seed=seed, loss=loss, checkpoint=config.Checkpoint(every=steps, log=20)
        )
        for seed in seeds
        for name, loss in LOSSES.items()
    }


def row(name: str, folder: Path) -> dict[str, Any]:
    """What a finished run says of itself."""
    head = json.loads((folder / "results.json").read_text())["results"]["heads"]["threshold"]
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in last if "loss" in line][-1]
    return {
        "run": name, "AUC": head["auc"], "low": head["auc_low"], "high": head["auc_high"], "loss": logged["loss"],
        "effective rank": logged["effective_rank"],
    }  # fmt: skip


def main() -> None:
    from faceembed.training import loop

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--runs", type=Path, default=Path("runs/margin_softmax"), help="finished runs there are kept")
    flags = parser.parse_args()
    rows = []
    for name, experiment in runs(flags.steps, flags.seeds).items():
        if not (flags.runs / name / "results.json").exists():
            loop.train(experiment, flags.runs / name)
        rows.append(row(name, flags.runs / name))
        print(report.table(rows), flush=True)


if __name__ == "__main__":
    main()

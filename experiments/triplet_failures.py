"""What do a healthy, a collapsed and a starved triplet training look like?  (About 3 minutes on 2 cores.)

    python -m experiments.triplet_failures [--out docs/img] [--runs runs/failures]

Three trainings of the quickstart's network on the synthetic source, 300 updates each; only what is named differs. The
curves go to triplet-loss.svg, triplet-rank.svg, triplet-active.svg and triplet-distances.svg, what the runs said of
themselves is printed. docs/triplet-training.md shows both.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments import quickstart
from faceembed import config, plots, report

MARGIN = 0.2

_BASE = dataclasses.replace(
    quickstart.EXPERIMENT,
    steps=300,
    loss=config.Triplet(miner="semi_hard", margin=MARGIN),
    schedule=config.Schedule(learning_rate=2e-3, warmup=40, ema=0.98),
    checkpoint=config.Checkpoint(every=300, log=10),
)

RUNS = {
    "healthy": _BASE,
    # The hardest negatives from the first step, and steps ten times as long without a warm-up.
    "collapsed": dataclasses.replace(
        _BASE,
        loss=config.Triplet(miner="hardest", margin=MARGIN),
        schedule=config.Schedule(learning_rate=2e-2, warmup=0, ema=0.98),
    ),
    # Few people, random triplets of small batches, a small margin, no augmentation: soon nothing is left to do.
    "starved": dataclasses.replace(
        _BASE,
        data=config.Data(people=100, photos=4),
        batch=config.Batch(people=3, photos=2),
        loss=config.Triplet(miner="random", margin=0.02),
        augment=config.Augment(flip=False, rotation=0, scale=0, shift=0, colour=0, grey=0, erase=0, degrade=0),
    ),
}


def curves(rows: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """{file name: SVG} of rows of metrics.jsonl, by the run's name."""

    def line(run: str, metric: str, name: str | None = None) -> plots.Line:
        found = [row for row in rows[run] if row.get(metric) is not None]
        return plots.Line(name=name or run, x=[row["step"] for row in found], y=[row[metric] for row in found])

    def each(metric: str, title: str, y_label: str, **options: Any) -> str:
        return plots.lines([line(run, metric) for run in rows], title=title, x_label="step", y_label=y_label, **options)

    distances = [
        plots.lines(
            [line(run, "d_ap_mean", "d(A,P)"), line(run, "d_an_mean", "d(A,N)")],
            title=f"{run.capitalize()}: mean squared distances", x_label="step", y_label="squared distance",
            y_range=(0, 3),
        )
        for run in rows
    ]  # fmt: skip
    margin = [plots.Mark(at=MARGIN, label="margin", axis="y")]
    return {
        "triplet-loss": each("loss", "Loss", "loss", y_range=(0, 2), marks=margin),
        "triplet-rank": each("effective_rank", "Effective rank", "directions", y_log=True),
        "triplet-active": each("active", "Active triplets", "share", y_range=(0, 1.02)),
        "triplet-distances": plots.grid(distances, columns=3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/img"), help="folder for the curves")
    parser.add_argument("--runs", type=Path, default=Path("runs/failures"), help="folder of the three run directories")
    parser.add_argument("--json", type=Path, help="also write the last row of each run to this file")
    flags = parser.parse_args()

    from faceembed.cli.train import use_compilation_cache

    use_compilation_cache()
    from faceembed.training import loop

    rows: dict[str, list[dict[str, Any]]] = {}
    said: dict[str, list[dict[str, Any]]] = {}
    for name, experiment in RUNS.items():
        loop.train(experiment, flags.runs / name)
        read = lambda file, name=name: [json.loads(x) for x in (flags.runs / name / file).read_text().splitlines()]  # noqa: E731
        rows[name], said[name] = read("metrics.jsonl"), read("events.jsonl")
    for name, svg in curves(rows).items():
        report.write_text(flags.out / f"{name}.svg", svg)
    last = [
        {
            "run": name,
            **{key: [row for row in rows[name] if row.get(key) is not None][-1][key]
               for key in ("loss", "effective_rank", "active", "d_ap_mean", "d_an_mean", "grad_norm", "select_auc")},
        }
        for name in RUNS
    ]  # fmt: skip
    print(f"\n{report.table(last)}")
    for name, events in said.items():
        for event in events:
            print(f"\n{name}, step {event['step']}: {event['message']}")
    if flags.json:
        report.write_json(flags.json, {"last": last, "events": said})


if __name__ == "__main__":
    main()

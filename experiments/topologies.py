"""Is a training the same on 1 × 8 devices, on 2 processes × 4, and moved from 8 to 4 to 1?  (15 minutes on two CPU cores.)

    python launch.py data prepare celeba --archive img_align_celeba.zip --identities identity_CelebA.txt
    python -m experiments.topologies --out docs/img/topologies.svg

Three times the same 60 updates on virtual CPU devices, by real commands: one process with eight devices; two processes
with four each, over loopback; and one that is killed after the checkpoints of steps 20 and 40 and goes on with fewer
devices. Draws their losses over each other, and how far the second and third are from the first, in float32 and float64.

The answer to expect: rounding, some 1e-7 in float32. Mining is a choice: where two negatives are equally near but for
rounding, another one may be taken, and from then on float32 runs differ by what one triplet changes. In float64 that is a
billion times rarer.
"""

import argparse
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from faceembed import plots, report

STEPS, MOVES = 60, {20: 8, 40: 4, 60: 1}
"""The third run: up to which step on how many devices."""
FLAGS = (
    "--preprocess.size", "32", "--encoder.widths", "8", "16", "32", "--encoder.blocks", "1", "1", "1", "--encoder.dim",
    "32", "--batch.people", "16", "--batch.photos", "4", "--steps", str(STEPS), "--schedule.warmup", "10",
    "--checkpoint.every", "20", "--checkpoint.log", "1", "--no-progress",
)  # fmt: skip


def start(run: Path, devices: int, *more: str) -> subprocess.Popen[bytes]:
    """A training in a process of its own, with virtual devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "launch.py", "train", "celeba", *FLAGS, "--run-dir", str(run), *more]
    return subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags})


def finish(*started: subprocess.Popen[bytes]) -> None:
    """Waits for processes that belong together.

    Raises:
      RuntimeError: one ended with an error, which it has printed.
    """
    statuses = [process.wait() for process in started]
    if any(statuses):
        raise RuntimeError("a training ended with an error; it stands above.")


def one(run: Path, *more: str) -> None:
    """One process with eight devices."""
    finish(start(run, 8, *more))


def two(run: Path, *more: str) -> None:
    """Two processes with four devices each."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    together = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id")
    finish(*(start(run, 4, *more, *together, str(number)) for number in range(2)))


def moved(run: Path, *more: str) -> None:
    """One training on ever fewer devices: killed as soon as the checkpoint of a step of `MOVES` is there."""
    for step, devices in MOVES.items():
        process = start(run, devices, *more)
        if step == STEPS:
            finish(process)
            return
        while not (run / "checkpoints" / str(step)).exists():
            if process.poll() is not None:
                raise RuntimeError("the training ended before it was moved.")
            time.sleep(0.01)
        process.kill()
        process.wait()


RUNS = {"1 process × 8 devices": one, "2 processes × 4": two, "8 → 4 → 1 devices": moved}
WHOLE = next(iter(RUNS))


def losses(run: Path) -> np.ndarray:
    """[STEPS] loss of each update."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return np.array([row["loss"] for row in rows if "loss" in row])


def apart(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """How far each run's losses are from those of the first."""
    return {name: np.abs(loss - found[WHOLE]) for name, loss in found.items() if name != WHOLE}


def drawn(found: dict[str, dict[str, np.ndarray]], source: str) -> str:
    """The figure of precision → run → losses: losses over each other, and beside them how far they are apart."""
    steps = np.arange(1, STEPS + 1)
    curves = [plots.Line(name=name, x=steps, y=loss) for name, loss in found["float32"].items()]
    pairs = [(precision, name, away) for precision, runs in found.items() for name, away in apart(runs).items()]
    differences = [
        plots.Line(name=f"{name}, {precision}: at most {away.max():.1e}", x=steps, y=away, hue=hue)
        for hue, (precision, name, away) in enumerate(pairs, start=1)
    ]
    ticks = {10.0**power: f"1e{power}" for power in range(-15, 0, 3)}
    moves = [plots.Mark(at=step, label=f"→ {MOVES[to]}") for step, to in itertools.pairwise(MOVES)]
    return plots.grid(
        [
            plots.lines(
                curves, title=f"Loss on {source}, float32", x_label="update", y_label="triplet loss", marks=moves
            ),
            plots.lines(
                differences,
                title=f"Difference from {WHOLE}",
                x_label="update",
                y_label="|difference|",
                y_log=True,
                y_ticks=ticks,
            ),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the figure, .svg")
    parser.add_argument("--runs", type=Path, default=Path("runs/topologies"), help="folder of the run directories")
    parser.add_argument("--source", default="celeba", help="photos: celeba, lfw, folder:PATH, …")
    options = parser.parse_args(arguments)
    found: dict[str, dict[str, np.ndarray]] = {}
    for precision in ("float32", "float64"):
        found[precision] = {}
        for name, train in RUNS.items():
            run = options.runs / f"{train.__name__}-{precision}"
            if not (run / "results.json").exists():
                train(run, "--data.source", options.source, "--precision", precision)
            found[precision][name] = losses(run)
    report.write_text(options.out, drawn(found, options.source))
    table = [
        {
            "precision": precision,
            "run": name,
            "loss of the first update": f"{found[precision][name][0]:.6f}",
            "of the last": f"{found[precision][name][-1]:.6f}",
            "largest difference": f"{away.max():.1e}",
            "in the first 20": f"{away[:20].max():.1e}",
        }
        for precision, runs in found.items()
        for name, away in apart(runs).items()
    ]
    print(f"{report.table(table)}\nwritten: {options.out}")


if __name__ == "__main__":
    main()

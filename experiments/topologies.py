"""Is a training the same on 1 × 8 devices, on 2 processes × 4, and moved from 8 to 4 to 1?  (10 minutes on two CPU cores.)

    python launch.py data prepare celeba --archive img_align_celeba.zip --identities identity_CelebA.txt
    python -m experiments.topologies --out docs/img/topologies.svg

Three times the same 60 updates on virtual CPU devices, by real commands: one process with eight devices; two processes
with four each, over loopback; and one that is killed after the checkpoints of steps 20 and 40 and goes on with fewer
devices. Draws their losses over each other, and how far the second and third are from the first. The answer to expect:
rounding, some 1e-7 at first, which training makes larger with every update.
"""

import argparse
import contextlib
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
NAMES = {"one": "1 process × 8 devices", "two": "2 processes × 4", "moved": "8 → 4 → 1 devices"}


def start(run: Path, devices: int, source: str, *more: str) -> subprocess.Popen[bytes]:
    """A training in a process of its own, with virtual devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "launch.py", "train", "celeba", "--data.source", source, *FLAGS, "--run-dir", str(run)]
    return subprocess.Popen([*command, *more], env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags})


def finish(*started: subprocess.Popen[bytes]) -> None:
    """Waits for processes that belong together.

    Raises:
      RuntimeError: one ended with an error, which it has printed.
    """
    statuses = [process.wait() for process in started]
    if any(statuses):
        raise RuntimeError("a training ended with an error; it stands above.")


def moved(run: Path, source: str) -> None:
    """One training on ever fewer devices: killed as soon as the checkpoint of a step of `MOVES` is there."""
    for step, devices in MOVES.items():
        process = start(run, devices, source)
        if step == STEPS:
            finish(process)
            return
        while not (run / "checkpoints" / str(step)).exists():
            if process.poll() is not None:
                raise RuntimeError("the training ended before it was moved.")
            time.sleep(0.01)
        process.kill()
        process.wait()


def losses(run: Path) -> np.ndarray:
    """[STEPS] loss of each update."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return np.array([row["loss"] for row in rows if "loss" in row])


def drawn(found: dict[str, np.ndarray], source: str) -> str:
    """The figure: losses over each other, and beside them how far they are apart."""
    steps = np.arange(1, STEPS + 1)
    curves = [plots.Line(name=NAMES[name], x=steps, y=loss) for name, loss in found.items()]
    apart = [
        plots.Line(
            name=f"{NAMES[name]}: at most {np.abs(loss - found['one']).max():.1e}", x=steps, hue=1 + place,
            y=np.abs(loss - found["one"]),
        )
        for place, (name, loss) in enumerate(pair for pair in found.items() if pair[0] != "one")
    ]  # fmt: skip
    moves = [plots.Mark(at=step, label=f"→ {to}") for step, to in zip(MOVES, [*MOVES.values()][1:], strict=False)]
    return plots.grid(
        [
            plots.lines(curves, title=f"Loss on {source}", x_label="update", y_label="triplet loss", marks=moves),
            plots.lines(apart, title="Difference from 1 process × 8 devices", x_label="update", y_label="|difference|",
                        y_log=True, marks=moves),
        ]
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the figure, .svg")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/topologies"), help="folder of the three run directories"
    )
    parser.add_argument("--source", default="celeba", help="photos: celeba, lfw, folder:PATH, …")
    options = parser.parse_args(arguments)
    finish(start(options.runs / "one", 8, options.source))
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    together = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id")
    finish(*(start(options.runs / "two", 4, options.source, *together, str(number)) for number in range(2)))
    moved(options.runs / "moved", options.source)
    found = {name: losses(options.runs / name) for name in NAMES}
    report.write_text(options.out, drawn(found, options.source))
    table = [
        {
            "run": NAMES[name],
            "loss of the first update": f"{loss[0]:.6f}",
            "of the last": f"{loss[-1]:.6f}",
            "largest difference": f"{np.abs(loss - found['one']).max():.1e}",
        }
        for name, loss in found.items()
    ]
    print(f"{report.table(table)}\nwritten: {options.out}")


if __name__ == "__main__":
    main()

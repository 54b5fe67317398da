"""How long until an answer?  (2 min on 2 cores.)

    python -m experiments.benchmarks.startup

Times commands as a user waits for them: help and a mistyped flag (bar: 1 s), and the first training step of quickstart
with an empty and with a filled compilation cache (bar with a filled one: 30 s).
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

from experiments.benchmarks import harness

ANSWERS = {
    "launch.py --help": ("--help",),
    "launch.py train quickstart --help": ("train", "quickstart", "--help"),
    "a mistyped flag": ("train", "quickstart", "--bacth.people", "3"),
    "a bad value": ("train", "quickstart", "--batch.photos", "1"),
}
FIRST_STEPS = {"first step, empty cache": None, "first step, filled cache": 30.0}
"""what -> bar, seconds."""


def seconds(arguments: tuple[str, ...], environment: dict[str, str]) -> tuple[float, str]:
    """(wall time, what was printed) of one command."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "launch.py", *arguments], env=environment, capture_output=True, text=True)
    return time.perf_counter() - began, done.stdout + done.stderr


def run(*, quick: bool = False) -> list[dict[str, Any]]:
    """A row a command, with the seconds until its answer."""
    rows: list[dict[str, Any]] = []
    for what, arguments in ANSWERS.items():
        times = [seconds(arguments, dict(os.environ))[0] for _ in range(2 if quick else 7)]
        low, middle, high = harness.summary(times)
        rows.append({"command": what, "seconds": middle, "q10": low, "q90": high, "bar": 1.0})
    if quick:
        return rows
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        for number, (what, bar) in enumerate(FIRST_STEPS.items()):
            command = ("train", "quickstart", "--steps", "1", "--run-dir", f"{folder}/{number}", "--no-progress")
            told = seconds(command, environment)[1]
            found = re.search(r"first step done ([\d.]+) s", told)
            if not found:
                raise RuntimeError(f"quickstart made no step:\n{told}")
            rows.append({"command": what, "seconds": float(found.group(1)), "bar": bar})
    return rows


if __name__ == "__main__":
    harness.main(run)

"""How long until an answer?  (2 min on 2 cores.)

    python -m experiments.benchmarks.startup

Times commands as a user waits for them: help and a mistyped flag (bar: 1 s), and the first training step of quickstart
with an empty and with a filled compilation cache (bar with a filled one: 30 s).
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

import psutil

ANSWERS = {
    "launch.py --help": ("--help",),
    "launch.py train quickstart --help": ("train", "quickstart", "--help"),
    "a mistyped flag": ("train", "quickstart", "--bacth.people", "3"),
    "a bad value": ("train", "quickstart", "--batch.photos", "1"),
}


def seconds(arguments: tuple[str, ...], environment: dict[str, str]) -> tuple[float, str]:
    """(wall time, what was printed) of one command."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "launch.py", *arguments], env=environment, capture_output=True, text=True)
    return time.perf_counter() - began, done.stdout + done.stderr


def main(repeats: int = 7) -> dict[str, float]:
    """Prints a table and returns {what: seconds}."""
    print(f"{psutil.cpu_count()} processors, load {psutil.getloadavg()[0]:.1f}; medians of {repeats}")
    results = {}
    for what, arguments in ANSWERS.items():
        times = [seconds(arguments, dict(os.environ))[0] for _ in range(repeats)]
        results[what] = statistics.median(times)
        print(f"{what:36} {results[what]:7.2f} s  ({min(times):.2f} … {max(times):.2f})")
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        for what in ("first step, empty cache", "first step, filled cache"):
            run = f"{folder}/{what[-12:-6]}"
            told = seconds(("train", "quickstart", "--steps", "1", "--run-dir", run, "--no-progress"), environment)[1]
            found = re.search(r"first step done ([\d.]+) s", told)
            if not found:
                raise RuntimeError(f"quickstart made no step:\n{told}")
            results[what] = float(found.group(1))
            print(f"{what:36} {results[what]:7.2f} s")
    return results


if __name__ == "__main__":
    main()

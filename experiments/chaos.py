"""Does `kill -9` spoil a run?  A run is killed at random moments, again and again, and must end as if nothing had happened.

python -m experiments.chaos --kills 20 --seed 0 --out /tmp/chaos     (about 5 minutes on two CPU cores)

Half of the kills are made to land inside a save, others while a process starts, trains, or writes the final report. The
transcript has a line a kill: where it landed, as the run directory shows afterwards, and what the next start said of it.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

TINY = (
    "quickstart", "--preprocess.size", "16", "--encoder.widths", "4", "8", "--encoder.blocks", "1", "1",
    "--encoder.dim", "16", "--batch.people", "8", "--checkpoint.log", "5", "--no-progress",
)  # fmt: skip
DATA = ("--data.people", "120", "--data.photos", "4")
XLA = ""
"""XLA_FLAGS of the processes; two runs that are compared need the same."""
EVERY = 6
CLOCKS = ("images_per_s", "host_memory_gb")
"""Fields of the log that no two runs share."""


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill, and what came of it."""

    aim: str
    """"start" | "save" | "training" | "report"."""
    landed: str
    """Where, as the run directory showed it afterwards."""
    in_save: bool
    """Whether it left a save half written."""
    said: str
    """What the next start said of it."""


def command(run: Path, steps: int, *more: str) -> list[str]:
    """The command that is given again and again."""
    flags = ["--steps", str(steps), "--checkpoint.every", str(EVERY), "--run-dir", str(run), *more]
    return [sys.executable, "launch.py", "train", *TINY, *DATA, *flags]


def environment(cache: Path) -> dict[str, str]:
    """One device, and compiled programs in a folder, so that only the first start compiles."""
    variables = {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA, "PYTHONUNBUFFERED": "1", "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    return os.environ | variables


def start(run: Path, log: Path, steps: int, cache: Path) -> subprocess.Popen[bytes]:
    """Gives the command."""
    with open(log, "wb") as file:
        return subprocess.Popen(
            command(run, steps), cwd=ROOT, env=environment(cache), stdout=file, stderr=subprocess.STDOUT
        )


def half_written(run: Path, before: Sequence[str] = ()) -> list[str]:
    """Steps whose save has begun and is not complete, except those that were so before."""
    names = {path.name.split(".")[0] for path in run.glob("checkpoints/*.orbax-checkpoint-tmp*")}
    return sorted(names - set(before), key=int)


def last_logged(run: Path) -> int:
    """The newest whole row of metrics.jsonl."""
    try:
        lines = (run / "metrics.jsonl").read_text().split("\n")
    except OSError:
        return 0
    return int(json.loads(lines[-2])["step"]) if len(lines) > 1 else 0


def saved(run: Path) -> list[int]:
    """Complete steps."""
    return sorted(int(path.name) for path in run.glob("checkpoints/*") if path.name.isdigit())


def reached(aim: str, run: Path, steps: int, draw: random.Random) -> Callable[[], bool]:
    """A question to ask again and again: is it time for the kill?"""
    if aim == "save":
        seen: set[str] = set(half_written(run))
        wanted = len(seen) + draw.randint(1, 2)

        def saving() -> bool:
            now = half_written(run)
            seen.update(now)
            return len(seen) >= wanted and bool(now)

        return saving
    if aim == "training":
        first = max(saved(run), default=0)
        target = first + draw.randint(1, 2 * EVERY)
        # Rows after the checkpoint are of the killed process until the next one has dropped them.
        before = (run / "metrics.jsonl").stat().st_ino if (run / "metrics.jsonl").exists() else 0

        def training() -> bool:
            file = run / "metrics.jsonl"
            return file.exists() and file.stat().st_ino != before and last_logged(run) >= target

        return training
    if aim == "report":
        return lambda: bool(saved(run)) and saved(run)[-1] == steps and not half_written(run)
    return lambda: True


def attack(
    run: Path, folder: Path, *, kills: int, steps: int, seed: int, seconds: float, tell: Callable[[str], None] = print
) -> list[Kill]:
    """Starts and kills a run until it has been killed so often, then lets it finish.

    Args:
      run: its directory.
      folder: for what it prints, and compiled programs.
      kills: how many.
      steps: updates of the run.
      seed: of the moments.
      seconds: that a start takes, compiling included; later ones compile nothing.
      tell: gets the transcript, line by line.
    """
    draw = random.Random(seed)
    report, early, training = max(1, kills // 10), kills // 6, kills // 4
    aims = ["start"] * early + ["training"] * training + ["save"] * (kills - report - early - training)
    draw.shuffle(aims)
    aims += ["report"] * report  # a run has one end
    done: list[tuple[str, str, bool]] = []
    said: list[str] = []
    while True:
        number = len(done)
        log = folder / f"start-{number:02d}.txt"
        process = start(run, log, steps, folder / "xla")
        try:
            landed = None
            if number < kills:
                landed = _killed(process, aims[number], run, steps, draw, seconds)
            if landed is None:
                process.wait(timeout=600)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if number:
            said.append(_said(log))
            aim, where, _ = done[-1]
            tell(f"kill {number:2}  {aim:8}  {where:60}  next start: {said[-1]}")
        if landed is None:
            if process.returncode:
                raise RuntimeError(f"the command failed, which no kill explains:\n{log.read_text()}")
            if number < kills:
                tell(f"the run ended before kill {number + 1}; it needs more steps to be killed so often")
            return [Kill(*entry, text) for entry, text in zip(done, said, strict=True)]
        done.append((aims[number], landed, landed.startswith("inside")))


def _killed(
    process: subprocess.Popen[bytes], aim: str, run: Path, steps: int, draw: random.Random, seconds: float
) -> str | None:
    """Kills when it is time; says where that was, or None if the process ended before."""
    began, before = time.monotonic(), half_written(run)
    now = reached(aim, run, steps, draw)
    later = {
        "start": draw.uniform(0.2, seconds),
        "report": draw.uniform(0, 0.05 * seconds),
        "save": draw.uniform(0, 0.04),
    }
    while not now():
        if process.poll() is not None:
            return None
        time.sleep(0.001)
    time.sleep(later.get(aim, draw.uniform(0, 0.1)))
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        return None
    at = f"{time.monotonic() - began:.1f} s after its start"
    if inside := half_written(run, before):
        return f"inside the save of step {', '.join(inside)}, {at}"
    newest = max(saved(run), default=0)
    if newest == steps:
        return f"after the last save, {'before' if not (run / 'report.html').exists() else 'after'} the report, {at}"
    return f"step {newest} saved, row {last_logged(run)} logged, {at}"


def _said(log: Path) -> str:
    words = ("going on from", "complete at", "damaged", "error")
    lines = [line.split(": ", 1)[-1] for line in log.read_text(errors="replace").splitlines()]
    found = [line for line in lines if any(word in line for word in words)]
    if not found:
        return (
            "nothing is saved yet, from the start" if "first step" in log.read_text() else "(killed before it said it)"
        )
    return "; ".join(found[:3])


def differences(one: Path, other: Path, step: int) -> Iterator[str]:
    """What tells two finished runs apart, clocks aside; nothing if every bit is the same."""
    from faceembed import checkpoint

    for item in ("params", "train"):
        prints = [checkpoint.fingerprint(arrays_of(run / "checkpoints" / str(step) / item)) for run in (one, other)]
        if prints[0] != prints[1]:
            yield f"{item} of step {step}: {prints[0][:12]} and {prints[1][:12]}"
    best = [checkpoint.find_step(run).name for run in (one, other)]
    if best[0] != best[1]:
        yield f"best step: {best[0]} and {best[1]}"
    for name in ("metrics.jsonl", "events.jsonl"):
        rows = [rows_of(run / name) for run in (one, other)]
        if rows[0] != rows[1]:
            yield f"{name}: {len(rows[0])} and {len(rows[1])} rows"
    for name, fields in (("results.json", ("results", "all_pairs")), ("policy.json", None)):
        values = [json.loads((run / name).read_text()) for run in (one, other)]
        if any(values[0][field] != values[1][field] for field in fields or values[0] | values[1]):
            yield name
    if left := half_written(other):
        yield f"left over: unfinished saves of steps {', '.join(left)}"


def arrays_of(item: Path) -> Any:
    """The arrays of a part of a step, as NumPy has them."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(item.resolve()).tree)
    try:
        return handler.restore(item.resolve(), args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    finally:
        handler.close()


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without its clocks."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in CLOCKS} for row in rows]


def uninterrupted(folder: Path, steps: int) -> tuple[Path, float]:
    """A run that nothing disturbs, and the seconds to its first update, compiling included."""
    run, log = folder / "whole", folder / "whole.txt"
    process = start(run, log, steps, folder / "xla")
    try:
        process.wait(timeout=600)
    finally:
        if process.poll() is None:
            process.kill()
    found = re.search(r"first step done ([0-9.]+) s", log.read_text())
    if process.returncode or not found:
        raise RuntimeError(log.read_text())
    return run, float(found[1])


def main() -> int:
    """Returns 0 if every bit is the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="a folder of its own")
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    whole, seconds = uninterrupted(flags.out, flags.steps)
    print(f"uninterrupted: {flags.steps} updates, a save every {EVERY}; the first update after {seconds:.1f} s")
    run = flags.out / "killed"
    found = attack(run, flags.out, kills=flags.kills, steps=flags.steps, seed=flags.seed, seconds=seconds)
    print()
    print(f"{len(found)} kills, {sum(kill.in_save for kill in found)} of them left a save half written")
    wrong = list(differences(whole, run, flags.steps))
    rows = len(rows_of(run / "metrics.jsonl"))
    same = f"bit for bit the uninterrupted run: parameters, averages, optimizer; {rows} rows of metrics.jsonl; results.json"
    print("verdict: " + ("NOT the uninterrupted run: " + "; ".join(wrong) if wrong else same))
    return bool(wrong) or len(found) < flags.kills


if __name__ == "__main__":
    sys.exit(main())

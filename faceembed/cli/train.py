"""`launch.py train EXPERIMENT`: an experiment with some of its fields changed, then the training loop."""

import dataclasses
import difflib
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from faceembed import config, processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains an experiment, or goes on where an earlier command stopped."""

    # Without a name of its own the experiment's fields are flags themselves: --steps, --batch.people.
    experiment: Annotated[config.Experiment, tyro.conf.arg(name="")]
    run_dir: Path
    """Where checkpoints, metrics and results go. A checkpoint in it is gone on from."""
    devices: int | None = None
    """Devices to divide the batch over; all when not given."""
    shard_optimizer: bool = False
    """Divide the optimizer's state and the moving averages over the devices (ZeRO-1) instead of keeping them on each."""
    skip_bad_steps: int = 20
    """Updates that are not finite are not applied; more than this many of them end the run."""
    skip_bad_photos: int = 10
    """Photos of training people that do not decode are replaced by others of the person, those of held-out people are left
    out of what is compared; more than so many of either end the run."""
    deterministic: bool = False
    """On GPUs: the same bits each time, with slower operations. A CPU gives them anyway."""
    profile: str | None = None
    """FIRST:LAST, such as 100:110: trace these updates with JAX's profiler, into RUN_DIR/profile."""
    wandb: str | None = None
    """Project on Weights & Biases to log to, beside metrics.jsonl and TensorBoard."""
    hosts: Literal["auto", "single", "multi"] = "auto"
    """Processes that train together, one a host: auto takes those that Slurm, Open MPI or an indexed Kubernetes job has
    started; single trains alone; multi insists on others."""
    coordinator: str | None = None
    """HOST:PORT of process 0, a free port there: for processes that are started by hand, or where detection is wrong."""
    num_processes: int | None = None
    """All processes, with --coordinator."""
    process_id: int | None = None
    """Which of them this one is, from 0, with --coordinator."""
    join_timeout: float = 300.0
    """Seconds in which all processes must have joined; then each ends with the reason."""
    json: Path | None = None
    """Write the final results there too."""
    progress: bool = True
    """Show progress bars."""


def run(arguments: list[str]) -> int:
    """See the module."""
    started = time.perf_counter()
    name, experiment, rest = chosen(arguments)
    options = tyro.cli(
        tyro.conf.AvoidSubcommands[Options],
        default=Options(experiment=experiment, run_dir=Path("runs") / name),
        args=rest,
        prog=f"launch.py train {name}",
        description=f"{Options.__doc__} {_choices_help()}",
    )
    source = options.experiment.data.source
    if source.startswith("folder:") and not Path(source.removeprefix("folder:")).expanduser().is_dir():
        raise ValueError(
            f"--data.source is {source!r}, and there is no such folder. It holds one folder a person, with their photos in."
        )
    if source.startswith("insightface:"):
        rec = Path(source.partition(":")[2]).expanduser()
        if not (rec / "train.rec" if rec.is_dir() else rec).is_file():
            raise ValueError(f"--data.source is {source!r}, and there is no such .rec, nor a folder with a train.rec.")
        if (template := options.experiment.preprocess.template) != "arcface":
            raise ValueError(
                f"--data.source is {source!r}, whose photos are crops of the template 'arcface', and --preprocess.template "
                f"is {template!r}. Add --preprocess.template arcface --preprocess.size 112."
            )
    if options.skip_bad_steps < 0:
        raise ValueError(f"--skip-bad-steps is {options.skip_bad_steps}: it counts from 0. Try --skip-bad-steps 20.")
    if options.skip_bad_photos < 0:
        raise ValueError(f"--skip-bad-photos is {options.skip_bad_photos}: it counts from 0. Try --skip-bad-photos 10.")
    profile = profiled(options.profile, options.experiment.steps)
    if options.deterministic:
        # Read when the back end starts, so before JAX is imported.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    use_compilation_cache()
    with processes.joined(
        options.hosts, options.coordinator, options.num_processes, options.process_id, join_seconds=options.join_timeout
    ):
        from faceembed.training import interrupts, loop

        try:
            results = loop.train(
                options.experiment, options.run_dir, devices=options.devices, shard_optimizer=options.shard_optimizer,
                skip_bad_steps=options.skip_bad_steps, skip_bad_photos=options.skip_bad_photos, profile=profile,
                wandb=options.wandb, progress=options.progress, started=started,
                command=shlex.join(["python", "launch.py", "train", *arguments]),
            )  # fmt: skip
        except interrupts.Stopped as stopped:
            print(stopped)
            return stopped.status
        if options.json and results is not None:
            from faceembed import report

            report.write_json(options.json, results)
    return 0


def profiled(text: str | None, steps: int) -> tuple[int, int] | None:
    """The first and the last update that `--profile FIRST:LAST` names.

    Raises:
      ValueError: if that is no range of updates of this training.
    """
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= steps):
        start = max(1, min(100, steps - 10))
        raise ValueError(
            f"--profile is {text!r}: expected the first and the last update, 1 to {steps}. "
            f"Try --profile {start}:{min(start + 10, steps)}."
        )
    return int(first), int(last)


def chosen(arguments: list[str]) -> tuple[str, config.Experiment, list[str]]:
    """The experiment that is named, with the union members that `--encoder`, `--loss` and `--optimizer` name.

    Returns:
      (name, experiment, the arguments that are left).
    """
    from experiments import EXPERIMENTS

    known = ", ".join(EXPERIMENTS)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: launch.py train EXPERIMENT [--run-dir DIR] [--flag value …]\n\nexperiments: {known}\n")
        print("launch.py train EXPERIMENT --help lists its flags and what they are set to.")
        sys.exit(0)
    name, *rest = arguments
    if name not in EXPERIMENTS:
        near = difflib.get_close_matches(name, EXPERIMENTS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else " Write it first: launch.py train quickstart --steps 100."
        raise ValueError(f"there is no experiment {name!r}; there are {known}.{hint}")
    experiment = EXPERIMENTS[name]
    left: list[str] = []
    words = iter(rest)
    for word in words:
        flag, equals, value = word.partition("=")
        field = flag.removeprefix("--")
        if not flag.startswith("--") or field not in config.CHOICES:
            left.append(word)
            continue
        value = value if equals else next(words, "")
        members = config.CHOICES[field]
        if value not in members:
            near = difflib.get_close_matches(value, members, 1)
            raise ValueError(
                f"--{field} is {value!r}; choose one of {', '.join(members)}. Try --{field} {(near or [*members])[0]}."
            )
        experiment = dataclasses.replace(experiment, **{field: members[value]})
    return name, experiment, left


def _choices_help() -> str:
    return " ".join(f"--{field} takes {' | '.join(members)}." for field, members in config.CHOICES.items())


def use_compilation_cache() -> None:
    """Keeps compiled programs in ~/.cache/faceembed/xla unless JAX_COMPILATION_CACHE_DIR says otherwise."""
    folder = Path("~/.cache/faceembed/xla").expanduser()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

"""`launch.py train EXPERIMENT`: an experiment with some of its fields changed, then the training loop."""

import dataclasses
import difflib
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

from faceembed import config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Trains an experiment, or goes on where an earlier command stopped."""

    # Without a name of its own the experiment's fields are flags themselves: --steps, --batch.people.
    experiment: Annotated[config.Experiment, tyro.conf.arg(name="")]
    run_dir: Path
    """Where checkpoints, metrics and results go. A checkpoint in it is gone on from."""
    devices: int | None = None
    """Devices to divide the batch over; all when not given."""
    json: Path | None = None
    """Write the final results there too."""
    progress: bool = True
    """Show progress bars."""


def run(arguments: list[str]) -> None:
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
    use_compilation_cache()
    from faceembed.training import loop

    results = loop.train(
        options.experiment, options.run_dir, devices=options.devices, progress=options.progress, started=started
    )
    if options.json:
        from faceembed import report

        report.write_json(options.json, results)


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

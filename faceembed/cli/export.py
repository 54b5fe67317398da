"""`launch.py export CHECKPOINT OUT`: a file that runs without this code."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Writes a checkpoint as one function with its weights, which JAX runs without faceembed:

    jax.export.deserialize(open(OUT, "rb").read()).call(photos)

    It takes uint8 RGB photos [b, size, size, 3], any number of them, cut to the checkpoint's template. OUT.json says which,
    and holds the heads and thresholds of the policy.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A run directory (its best step is taken), a step directory, or dlib."""
    out: Annotated[Path, tyro.conf.Positional]
    """The file to write, such as celeba.stablehlo."""
    platform: Literal["cpu", "cuda", "tpu"] | None = None
    """Where it will run; here, when not given."""
    json: Path | None = None
    """Write what OUT.json holds there, too."""


def run(arguments: list[str]) -> None:
    """See the module."""
    options = tyro.cli(Options, args=arguments, prog="launch.py export")
    if options.out.is_dir():
        raise ValueError(f"OUT is {options.out}, a folder: name a file in it, {options.out / 'encoder.stablehlo'}.")
    import jax

    from faceembed import embed, export, report

    embedder = embed.load(options.checkpoint)
    platform = options.platform or {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    data, card = export.export(embedder, platform)
    report.write_bytes(options.out, data)
    report.write_json(options.out.with_name(f"{options.out.name}.json"), card)
    print(
        f"{options.out}: {card['input']} → {card['output']} on {platform}, {len(data) / 1e6:.1f} MB, crops of the template "
        f"{card['template']!r}; {options.out.name}.json beside it"
    )
    if options.json:
        report.write_json(options.json, card)

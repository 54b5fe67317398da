"""`launch.py embed CHECKPOINT SOURCE --out FILE`: embeddings of a whole source."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from faceembed.cli.train import use_compilation_cache

CHUNK = 4096
"""Photos decoded at once: bounds memory whatever the size of the source."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Embeds every photo of a source into one .npz: embedding [n, d] float32, key [n], identity [n], people [m]."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A run directory (its best step is taken) or a step directory."""
    source: Annotated[str, tyro.conf.Positional]
    """celeba | lfw | synthetic | folder:PATH."""
    out: Path
    """The .npz file to write."""
    data_dir: Path | None = None
    """Where prepared sets are kept; $FACEEMBED_DATA or ~/.cache/faceembed/data when not given."""
    batch: int = 256
    """Photos at once on the device."""
    json: Path | None = None
    """Write a summary there."""
    progress: bool = True
    """Show a progress bar."""


def run(arguments: list[str]) -> None:
    """See the module."""
    options = tyro.cli(Options, args=arguments, prog="launch.py embed")
    if options.out.suffix != ".npz":
        raise ValueError(
            f"--out is {options.out}: the result is an .npz file. Try --out {options.out.with_suffix('.npz')}."
        )
    if options.batch < 1:
        raise ValueError(f"--batch is {options.batch}: at least one photo at once. Try --batch 256.")
    from faceembed import report
    from faceembed.data import pipeline, sources

    photos = sources.open_source(options.source, data_dir=options.data_dir)
    use_compilation_cache()
    from faceembed import embed

    embedder = embed.load(options.checkpoint)
    started = time.perf_counter()
    parts = []
    for start in sources.progress_bar(range(0, len(photos), CHUNK), None, "embedding", shown=options.progress):
        mask = np.zeros(len(photos), bool)
        mask[start : start + CHUNK] = True
        crops = pipeline.decode_all(sources.select(photos, mask), embedder.size, progress=False)
        parts.append(embedder(crops, options.batch))
    embeddings = np.concatenate(parts)
    seconds = time.perf_counter() - started
    options.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.out.with_name(f".{options.out.name}.{os.getpid()}.tmp.npz")
    np.savez(temporary, embedding=embeddings, key=photos.keys, identity=photos.identity, people=photos.people)
    os.replace(temporary, options.out)
    print(
        f"{options.out}: {len(embeddings):,} embeddings of {embeddings.shape[1]} numbers, {len(photos.people):,} people, "
        f"by {embedder.path}; {len(embeddings) / seconds:.0f} photos/s"
    )
    if options.json:
        content = {
            "checkpoint": str(embedder.path), "source": options.source, "fingerprint": photos.fingerprint,
            "photos": len(photos), "people": len(photos.people), "dim": embeddings.shape[1], "seconds": seconds,
        }  # fmt: skip
        report.write_json(options.json, content)

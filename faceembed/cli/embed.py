"""`launch.py embed CHECKPOINT SOURCE --out FILE`: embeddings of a whole source."""

import dataclasses
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from faceembed.cli.train import use_compilation_cache

if TYPE_CHECKING:
    from faceembed.embed import Embedder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Embeds every photo of a source into one .npz: embedding [n, d] float32, key [n], identity [n], people [m],
    checkpoint (the fingerprint of its parameters)."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A run directory (its best step is taken) or a step directory."""
    source: Annotated[str, tyro.conf.Positional]
    """celeba | lfw | synthetic | folder:PATH | insightface:PATH | prepared:NAME. A
    checkpoint trained on synthetic people gets the same people."""
    framing: Literal["celeba", "lfw"] | None = None
    """folder:PATH: the photos are framed like CelebA's aligned ones or like deep-funneled LFW, at any size. When not
    given, they are cropped tightly already: the largest centred square is taken."""
    out: Path
    """The .npz file to write."""
    data_dir: Path | None = None
    """Where prepared sets are kept; $FACEEMBED_DATA or ~/.cache/faceembed/data when not given."""
    batch: int = 256
    """Photos at once on the device."""
    json: Path | None = None
    """Write a summary there."""
    progress: bool = True
    """Show progress bars."""


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
    from faceembed.data import sources

    # What is wrong with the photos is told before JAX is imported; only synthetic ones depend on the checkpoint.
    embedder = load(options.checkpoint) if options.source == "synthetic" else None
    drawn = synthetic_options(embedder) if embedder else {}
    photos = sources.open_source(options.source, data_dir=options.data_dir, progress=options.progress, **drawn)
    if options.framing:
        photos = sources.framed(photos, options.framing)
    for line in sources.problem_lines(photos):
        print(line)
    embedder = embedder or load(options.checkpoint)
    from faceembed import evaluate
    from faceembed.data import crops

    photos = crops.framed_for(photos, embedder.preprocess)
    started = time.perf_counter()
    embeddings, _ = evaluate.embed_photos(embedder, photos, batch=options.batch, progress=options.progress)
    seconds = time.perf_counter() - started
    options.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.out.with_name(f".{options.out.name}.{os.getpid()}.tmp.npz")
    np.savez(
        temporary, embedding=embeddings, key=photos.keys, identity=photos.identity, people=photos.people,
        checkpoint=embedder.fingerprint,
    )  # fmt: skip
    os.replace(temporary, options.out)
    print(
        f"{options.out}: {len(embeddings):,} embeddings of {embeddings.shape[1]} numbers, {len(photos.people):,} people, "
        f"by {embedder.path}; {len(embeddings) / seconds:.0f} photos/s"
    )
    if photos.tally:
        print(photos.tally)
    if options.json:
        content = {
            "checkpoint": str(embedder.path), "source": options.source, "framing": options.framing,
            "fingerprint": photos.fingerprint, "photos": len(photos), "people": len(photos.people),
            "dim": embeddings.shape[1], "alignment": photos.tally.to_dict() if photos.tally else None,
            "seconds": seconds,
        }  # fmt: skip
        report.write_json(options.json, content)


def load(checkpoint: Path) -> "Embedder":
    """The checkpoint, with the compilation cache in use."""
    use_compilation_cache()
    from faceembed import embed

    return embed.load(checkpoint)


def synthetic_options(embedder: "Embedder") -> dict[str, Any]:
    """What `open_source("synthetic", …)` draws for a checkpoint: its own people, if it was trained on synthetic ones."""
    config = embedder.config
    if config.data.source != "synthetic":
        return {"size": embedder.size}
    return {
        "seed": config.seed, "people": config.data.people, "photos": config.data.photos, "size": embedder.size,
    }  # fmt: skip

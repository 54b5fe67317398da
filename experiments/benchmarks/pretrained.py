"""dlib's network here and in dlib, and from JPEG files to embeddings: photos a second, and where the time goes.  (3 min.)

    pip install -e '.[dlib,align]'
    python -m experiments.benchmarks.pretrained

Chips: 32 at once, the same to both, by turns; a ratio above 1 says how many times as fast as dlib we are. Bar: 1.

Folder: 240 JPEG files of 250 px (LFW's size), drawn by the synthetic source, from the disk to embeddings: each stage by
itself on one thread, and the whole as `launch.py embed` runs it, with the share of the CPUs that it kept busy.
"""

import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from experiments.benchmarks import harness
from faceembed import embed, evaluate
from faceembed.data import crops, sources, synthetic
from faceembed.encoders import dlib_resnet

BATCH = 32
PHOTOS = 240


def chips_row(quick: bool) -> dict[str, Any]:
    """Chips a second of both."""
    chips = np.random.default_rng(0).integers(0, 256, (BATCH, 150, 150, 3), dtype=np.uint8)
    embedder = embed.load("dlib")
    contestants = {"faceembed": lambda: jax.block_until_ready(embedder.embed(embedder.variables, chips))}
    if harness.available("dlib"):
        import dlib

        network, listed = dlib.face_recognition_model_v1(str(dlib_resnet.weights_path())), list(chips)
        contestants["dlib"] = lambda: network.compute_face_descriptor(listed, 0)
    times = harness.interleave(contestants, repeats=3 if quick else 15)
    return {"what": f"{BATCH} chips", **harness.versus(times, "dlib", images=BATCH), "bar": 1.0}


def drawn(folder: Path, people: int) -> None:
    """A folder a person, four photos each."""
    person, photo = np.divmod(np.arange(4 * people), 4)
    for start in range(0, len(person), 40):
        part = slice(start, start + 40)
        for who, which, pixels in zip(
            person[part], photo[part], synthetic.render(0, person[part], photo[part], size=140), strict=True
        ):
            file = folder / f"{who:03d}" / f"{which}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            # The face takes LFW's share of the photo.
            Image.fromarray(np.pad(pixels, ((55, 55), (55, 55), (0, 0)), mode="edge")).save(file, quality=90)


def folder_rows(quick: bool) -> list[dict[str, Any]]:
    """Milliseconds a photo of each stage, then photos a second of the whole."""
    embedder = embed.load("dlib")
    aligner = crops.Aligner(template="dlib", size=150)
    with tempfile.TemporaryDirectory() as name:
        drawn(Path(name) / "photos", 4 if quick else PHOTOS // 4)
        photos = sources.open_source(f"folder:{Path(name) / 'photos'}", data_dir=Path(name), progress=False)
        some = range(min(len(photos), 40))
        read = [photos.read(index) for index in some]
        found = [crops.find(photo, aligner).face for photo in read]
        faces = [
            (photo, crops.place(face, aligner)) for photo, face in zip(read, found, strict=True) if face is not None
        ]
        chips = np.zeros((BATCH, 150, 150, 3), np.uint8)
        stages = {
            "read and decode": lambda: [photos.read(index) for index in some],
            "find the face": lambda: [crops.find(photo, aligner) for photo in read],
            "cut the chip": lambda: [crops.draw(photo, matrix, 150, crops.CANVAS) for photo, matrix in faces],
            "embed": lambda: jax.block_until_ready(embedder.embed(embedder.variables, chips)),
        }
        counts = {"read and decode": len(read), "find the face": len(read), "cut the chip": len(faces), "embed": BATCH}
        times = harness.interleave(stages, repeats=2 if quick else 7)
        rows: list[dict[str, Any]] = [
            {"what": what, "ms a photo": 1e3 * harness.summary(taken).median / counts[what], "threads": threads}
            for (what, taken), threads in zip(times.items(), (1, 1, 1, harness.processors()), strict=True)
        ]
        evaluate.embed_photos(embedder, photos, progress=False)  # compiles
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        evaluate.embed_photos(embedder, photos, progress=False)
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
        busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        rows.append(
            {
                "what": "files to embeddings", "ms a photo": 1e3 * seconds / len(photos), "threads": harness.processors(),
                "photos/s": len(photos) / seconds, "CPUs busy": busy / seconds / harness.processors(),
                "faces found": len(faces) / len(read),
            }
        )  # fmt: skip
    return rows


def run(*, quick: bool = False) -> list[dict[str, Any]]:
    """A row for the chips of both, then a row a stage."""
    return [chips_row(quick), *folder_rows(quick)]


if __name__ == "__main__":
    harness.main(run)

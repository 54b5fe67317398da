"""How fast do JPEG files become an augmented training batch, beside PyTorch's DataLoader and Pillow?  (1 min on 2 cores.)

    python -m experiments.benchmarks.reading

A folder of generated faces, 178 × 218 px JPEG files of quality 90, is read again at each pass: decoded, the face's square
resized to 126 px, then rotated, scaled, shifted, mirrored, jittered in colour, greyed, blurred, erased and normalised
into float32 batches of 64 at 112 px, in faceembed's default strengths. The square that each side cuts is asserted equal.

faceembed reads with grain's threads, as for a set that does not fit in memory, and augments the batch on the device.
The peer does as torchvision does, which is not there for every PyTorch: one image after the other with Pillow, erasing
and normalising on the tensor, in the main process or in 2 persistent workers, on the same CPUs. The draws differ.

A pass starts with nothing read ahead and ends with nothing left. What no pass pays: the start of workers, compilation,
the first reading of a file from disk, and the check of every file when a folder is opened. Bar: 1.0.
"""

import io
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from experiments.benchmarks import harness
from faceembed import config, mesh
from faceembed.data import pipeline, sampling, sources, synthetic
from faceembed.preprocess import crop_side, framed_square
from faceembed.training import loop

WIDTH, HEIGHT, SIZE = 178, 218, 112
PEOPLE, PHOTOS = 16, 4
BATCH = PEOPLE * PHOTOS
EXPERIMENT = config.Experiment(preprocess=config.Preprocess(size=SIZE), encoder=config.MobileFaceNet())
MARGIN, AUGMENT = EXPERIMENT.data.margin, EXPERIMENT.augment


def write_faces(folder: Path, people: int, photos: int) -> None:
    """FOLDER/PERSON/PHOTO.jpg, framed as aligned CelebA is."""
    faces = synthetic.render_all(0, people, photos, HEIGHT).reshape(people, photos, HEIGHT, HEIGHT, 3)
    left = (HEIGHT - WIDTH) // 2
    for person in range(people):
        (folder / f"{person:04d}").mkdir(parents=True)
        for photo in range(photos):
            image = Image.fromarray(faces[person, photo, :, left : left + WIDTH])
            image.save(folder / f"{person:04d}" / f"{photo:02d}.jpg", quality=90)


def ours(photos: sources.Photos, sampler: sampling.Sampler, steps: int) -> Callable[[], object]:
    """faceembed's pass over `steps` batches, read from their files."""
    one = mesh.make_mesh(1)
    views = jax.jit(loop.make_views(EXPERIMENT))

    def call() -> None:
        read = pipeline.batches(photos, sampler, size=SIZE, margin=MARGIN, steps=steps, memory_limit_bytes=0)
        # As in training, the host reads ahead while the device computes.
        batches = [views(step, moved["slot"], moved["image"]) for step, moved in enumerate(mesh.to_devices(read, one))]
        jax.block_until_ready(batches)

    return call


class Faces:
    """The peer's dataset: (index, seed) → float32 [3, SIZE, SIZE] tensor and the person's number."""

    def __init__(self, files: list[Path], identity: np.ndarray):
        self.files, self.identity = files, identity

    def __len__(self) -> int:
        return len(self.files)

    def crop(self, index: int) -> Image.Image:
        """The face's square with the margin around it, as `preprocess.crop_square` cuts it."""
        side, square = crop_side(SIZE, MARGIN), framed_square("celeba", WIDTH)
        half = square.side * side / SIZE / 2
        box = (square.x - half, square.y - half, square.x + half, square.y + half)
        with Image.open(io.BytesIO(self.files[index].read_bytes())) as image:
            return image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR, box=box)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        import torch

        draw = torch.rand(18).tolist()
        view = self._colour(draw[5:12], self._warp(draw[0:5], self.crop(index)))
        if draw[12] < AUGMENT.grey:
            view = view.convert("L").convert("RGB")
        if draw[13] < AUGMENT.degrade:
            view = view.filter(ImageFilter.GaussianBlur((0.5 + 1.5 * draw[13] / AUGMENT.degrade) * SIZE / 64))
        tensor = torch.from_numpy(np.array(view)).permute(2, 0, 1).float()
        if draw[14] < AUGMENT.erase:
            aspect = math.exp((2 * draw[15] - 1) * math.log(3))
            area = 0.02 + 0.18 * draw[14] / AUGMENT.erase
            height, width = (round(math.sqrt(area * ratio) * SIZE) for ratio in (aspect, 1 / aspect))
            top, left = int(draw[16] * (SIZE - height)), int(draw[17] * (SIZE - width))
            hole = tensor[:, max(0, top) : top + height, max(0, left) : left + width]
            hole.copy_(255 * torch.rand_like(hole))
        pre = EXPERIMENT.preprocess
        return (tensor - torch.tensor(pre.mean).reshape(-1, 1, 1)) / pre.scale, int(self.identity[index])

    @staticmethod
    def _warp(draw: list[float], image: Image.Image) -> Image.Image:
        """Rotation, scale, shift and mirror in one bilinear reading."""
        signed = [2 * number - 1 for number in draw]
        angle, zoom = math.radians(AUGMENT.rotation) * signed[0], math.exp(signed[1] * math.log1p(AUGMENT.scale))
        cos, sin, mirror = math.cos(angle) * zoom, math.sin(angle) * zoom, -1 if signed[4] < 0 else 1
        middle, half = image.width / 2, SIZE / 2
        across, down = (middle + AUGMENT.shift * SIZE * number for number in signed[2:4])
        matrix = (
            cos * mirror, -sin, across - half * (cos * mirror - sin),
            sin * mirror, cos, down - half * (sin * mirror + cos),
        )  # fmt: skip
        return image.transform((SIZE, SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)

    @staticmethod
    def _colour(draw: list[float], image: Image.Image) -> Image.Image:
        """Brightness, contrast, saturation, and a gain for each channel."""
        strength = AUGMENT.colour
        for enhance, most, number in zip(
            (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), (0.7, 0.7, 1.0), draw, strict=False
        ):
            image = enhance(image).enhance(1 + (2 * number - 1) * strength * most)
        gains = [1 + 0.3 * strength * (2 * number - 1) for number in draw[3:6]]
        return image.point([min(255, round(level * gain)) for gain in gains for level in range(256)])


def peers(faces: Faces, plan: list[list[int]], workers: int) -> Callable[[], object]:
    """PyTorch's pass over the same batches."""
    torch = harness.pytorch()
    device = harness.torch_device()
    loader = torch.utils.data.DataLoader(
        faces, batch_sampler=plan, num_workers=workers, persistent_workers=workers > 0, pin_memory=device == "cuda",
        multiprocessing_context="spawn" if workers else None,  # a fork of a process that runs XLA's threads may hang
    )  # fmt: skip

    def call() -> None:
        for images, _ in loader:
            images.to(device, non_blocking=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def run(*, quick: bool = False) -> list[dict[str, Any]]:
    """A row for each number of the peer's workers."""
    people, steps, repeats = (PEOPLE, 2, 2) if quick else (4 * PEOPLE, 12, 7)
    with tempfile.TemporaryDirectory() as folder:
        write_faces(Path(folder) / "faces", people, 2 * PHOTOS)
        photos = sources.framed(
            sources.open_source(f"folder:{folder}/faces", data_dir=Path(folder) / "data", progress=False), "celeba"
        )
        sampler = sampling.make_sampler(photos.identity, people=PEOPLE, photos=PHOTOS, seed=0)
        contestants = {"faceembed": ours(photos, sampler, steps)}
        counts = (0, 2) if harness.available("torch") else ()
        faces = Faces([Path(folder) / "faces" / f"{key}.jpg" for key in photos.keys], photos.identity)
        first = next(pipeline.batches(photos, sampler, size=SIZE, margin=MARGIN, steps=1, memory_limit_bytes=0))
        for image, index in zip(first["image"], first["index"], strict=True):
            np.testing.assert_array_equal(image, np.asarray(faces.crop(int(index))), err_msg="the two do not compare")
        plan = [sampler.batch(step).tolist() for step in range(steps)]
        contestants |= {f"{workers} workers": peers(faces, plan, workers) for workers in counts}
        times = harness.interleave(contestants, repeats=repeats)
        kilobytes = np.mean([file.stat().st_size for file in faces.files]) / 1e3
        rows = []
        for workers in counts or (0,):
            columns = {name.replace(f"{workers} workers", "PyTorch"): times[name] for name in times}
            row = {"batch": BATCH, "kB a file": kilobytes, "XLA": harness.processors(), "workers": workers}
            rows.append(row | harness.versus(columns, "PyTorch", images=BATCH * steps) | {"bar": 1.0})
        return rows


if __name__ == "__main__":
    harness.main(run)

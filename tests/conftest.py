"""Eight virtual CPU devices, settled before anything imports JAX, and where the real photographs are."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ["JAX_PLATFORMS"] = "cpu"

# Nearly all of the suite's time is XLA's compiler, for programs that then run for milliseconds. These flags leave out what
# makes them quicker to run: a third of the processor time. FACEEMBED_TEST_XLA='' tests what a training compiles.
UNOPTIMISED = (
    "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true", "--xla_cpu_use_fusion_emitters=false",
)  # fmt: skip


def known(flags: tuple[str, ...]) -> str:
    """As many of the flags, from the left, as this XLA knows: it ends a process that names another."""
    for count in range(len(flags), 0, -1):
        asked = [sys.executable, "-c", "import jax; jax.devices()"]
        process = subprocess.run(asked, env={**os.environ, "XLA_FLAGS": " ".join(flags[:count])}, capture_output=True)
        if process.returncode == 0:
            return " ".join(flags[:count])
    return ""


if "FACEEMBED_TEST_XLA" not in os.environ:  # once: the workers of a parallel run inherit it
    os.environ["FACEEMBED_TEST_XLA"] = known(UNOPTIMISED)


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of a process with so many virtual devices."""
    return f"{os.environ['FACEEMBED_TEST_XLA']} --xla_force_host_platform_device_count={devices}"


os.environ["XLA_FLAGS"] = xla_flags(8)


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory) -> None:
    """A folder for compiled programs of processes that a test starts; a parallel run's workers have one each."""
    os.environ["FACEEMBED_TEST_CACHE"] = str(tmp_path_factory.mktemp("xla"))


# Collecting garbage looks through all that JAX keeps of programs: a tenth of the time, at Python's own thresholds.
gc.set_threshold(200_000, 50, 100)

# Files whose tests start processes or compile most, the longest first: begun last, one of them would end the suite alone.
LONG = (
    "multihost",
    "train",
    "reliability",
    "step",
    "losses_devices",
    "transfer",
    "microbatches",
    "tiled",
    "benchmarks",
)


def pytest_collection_modifyitems(items) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real photographs: $FACEEMBED_TEST_DATA, or shared/data beside the checkout; skips when absent."""
    folder = Path(os.environ.get("FACEEMBED_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real photographs at {folder}; set FACEEMBED_TEST_DATA to a folder with lfw/ and celeba/")
    return folder


@pytest.fixture(scope="session")
def pictures() -> np.ndarray:
    """uint8 [120, 4, 36, 36, 3], four photos of each of quickstart's first 120 people. Drawn once: that takes seconds, and
    another size seconds more."""
    from faceembed.data import synthetic

    return synthetic.render_all(0, 120, 4, 36).reshape(120, 4, 36, 36, 3)


def save_photos(folder: Path, pictures: np.ndarray, name: str = "synthetic_s0_{:06d}/{:04d}.png", **options) -> Path:
    """Writes [people, photos, height, width, 3] into files of a folder, named by person and photo."""
    from PIL import Image

    for person, photo in np.ndindex(pictures.shape[:2]):
        path = folder / name.format(person, photo)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures[person, photo]).save(path, **options)
    return folder


@pytest.fixture(scope="session")
def faces(tmp_path_factory, pictures) -> tuple[str, ...]:
    """The flags of `train` for `pictures` in a folder, with the names that the synthetic source gives them: to draw them
    takes a tiny training a third of its time."""
    folder = tmp_path_factory.mktemp("faces")
    photos = save_photos(folder / "photos", pictures)
    return "--data.source", f"folder:{photos}", "--data.data-dir", str(folder / "data")


@pytest.fixture(scope="session")
def noise_photos():
    """120 people with four photos of noise each, 16 px: enough to be split, and nothing to be rendered."""
    from faceembed.data import sources

    names = np.array([f"p{i:03d}" for i in range(120)])
    identity = np.repeat(np.arange(120, dtype=np.int32), 4)
    pixels = np.random.default_rng(0).integers(0, 256, (480, 16, 16, 3), np.uint8)
    return sources.Photos(
        source="synthetic", keys=np.array([f"{names[who]}/{i % 4}" for i, who in enumerate(identity)]),
        identity=identity, people=names, read=lambda index: pixels[index], square=None, problems=(), fingerprint="f" * 64,
    )  # fmt: skip

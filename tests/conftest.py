"""Eight virtual CPU devices, settled before anything imports JAX, and where the real photographs are."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import numpy as np
import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real photographs: $FACEEMBED_TEST_DATA, or shared/data beside the checkout; skips when absent."""
    folder = Path(os.environ.get("FACEEMBED_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real photographs at {folder}; set FACEEMBED_TEST_DATA to a folder with lfw/ and celeba/")
    return folder


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

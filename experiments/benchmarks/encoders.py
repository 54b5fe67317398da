"""What does each encoder cost, and when is it the one to choose?  (5 min on 2 cores.)

    python -m experiments.benchmarks.encoders

Parameters, floating-point operations for one photo at the encoder's native size, and photos a second: batches of 32
normalised float32 photos in, embeddings out, evaluation, no flip fusion. The encoders take turns, so that a busy machine
slows all alike; printed is the median with the 10 % and 90 % quantiles.

A multiplication and the addition after it are two operations (papers often print half as much and call it FLOPs or
MAdds). Counted exactly are the products of convolutions, dense layers and attention, from the traced program; norms,
activations and pooling are left out, and the zeros of padding are multiplied too, as is customary. Published:
MobileFaceNet 221 M multiply-adds at d=128 (Chen et al. 2018, table 2), iresnet50 6.3 G and iresnet100 12.1 G (InsightFace's
model zoo), ViT-T 1.5 G with patches of 9 px.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.benchmarks import harness
from faceembed.encoders import ENCODERS, layers, make_encoder

BATCH = 32
NATIVE_SIZE = {"convnet": 64, "inception_resnet_v1": 160, "dlib_resnet": 150}
"""Side of the photos in pixels; 112 for the others."""
WHEN = {
    "convnet": "64 px on a CPU: quickstart, tests, ablations by the dozen",
    "mobilefacenet": "phones and CPUs at 112 px; the fewest parameters",
    "iresnet18": "the first 112 px network on one GPU",
    "iresnet34": "when iresnet18 underfits and iresnet50 is too slow",
    "iresnet50": "the usual size on GPUs, and what most papers compare with",
    "iresnet100": "millions of photos and several GPUs; ArcFace's own network",
    "inception_resnet_v1": "to reproduce FaceNet, or to use facenet-pytorch's weights",
    "vit": "millions of photos in bfloat16 on GPUs; small sets overfit",
    "dlib_resnet": 'with dlib\'s published weights: `fe.load("dlib")`, fine-tuning on few photos',
}


def native_size(name: str) -> int:
    """Side in pixels of the photos an encoder was made for."""
    return NATIVE_SIZE.get(name, 112)


def abstract(encoder: nn.Module, size: int, batch: int = 1) -> tuple[Any, jax.ShapeDtypeStruct]:
    """Shapes of (variables, images [batch, size, size, 3])."""
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    return jax.eval_shape(functools.partial(encoder.init, train=False), jax.random.key(0), images), images


def multiply_adds(encoder: nn.Module, size: int) -> int:
    """Multiplications, each with its addition, that embed one photo of size × size pixels."""
    variables, images = abstract(encoder, size)
    # On a CPU depthwise layers are traced as shifted sums, which do not show as products.
    with mock.patch.object(layers, "default_form", return_value="conv"):
        program = jax.make_jaxpr(functools.partial(encoder.apply, train=False))(variables, images)
    return sum(_products(program))


def _products(program: Any) -> Iterator[int]:
    for equation in program.eqns:
        output = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            channels_out = equation.params["dimension_numbers"].rhs_spec[0]
            yield output * math.prod(kernel) // kernel[channels_out]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            yield output * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "eqns")):
            if hasattr(inner, "eqns"):
                yield from _products(inner)


def call(name: str, batch: int) -> Callable[[], jax.Array]:
    """() → embeddings [batch, d] of fixed photos, compiled at its first call."""
    encoder, size = make_encoder(name), native_size(name)
    images = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
    variables = jax.jit(functools.partial(encoder.init, train=False))(jax.random.key(1), images[:1])
    embed = jax.jit(functools.partial(encoder.apply, train=False))
    return lambda: jax.block_until_ready(embed(variables, images))


def run(*, quick: bool = False) -> list[dict[str, Any]]:
    """A row for each encoder; `quick` times the two smallest alone, two photos at a time."""
    names = ("convnet", "mobilefacenet") if quick else tuple(ENCODERS)
    batch = 2 if quick else BATCH
    times = harness.interleave({name: call(name, batch) for name in names}, repeats=1 if quick else 5)
    rows = []
    for name in ENCODERS:
        encoder, size = make_encoder(name), native_size(name)
        row = {
            "encoder": name,
            "pixels": size,
            "d": encoder.dim,
            "parameters": f"{sum(leaf.size for leaf in jax.tree.leaves(abstract(encoder, size)[0]['params'])) / 1e6:.2f} M",
            "GFLOPs": round(2 * multiply_adds(encoder, size) / 1e9, 2),
        }
        if name in times:
            spread = harness.summary(times[name])
            row |= {"photos/s": batch / spread.median, "q10": batch / spread.q90, "q90": batch / spread.q10}
        rows.append(row | {"when": WHEN[name]})
    return rows


if __name__ == "__main__":
    harness.main(run)

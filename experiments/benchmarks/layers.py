"""What does each layer's form and each hand-written gradient pay, by itself?  (2 min on 2 cores.)

    python -m experiments.benchmarks.layers

Value and gradient of one layer, batch 32, float32. In the first table "dots", the form that `layers.default_form` takes on
a CPU, against "conv", XLA's convolution, which other back ends take. In the second the gradient written by hand against
what automatic differentiation makes of the same function. "ratio" is how many times as fast the first of the two is.

What did not pay on XLA's CPU back end, and is not here: 3×3 convolutions as nine dots or as im2col, forward; the kernel
gradient as a matrix product with fewer than 48 channels (2.5 times as long at 16); a 1×1 product of the 4-D array (3 times
as long as the flat one); oneDNN's flag.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.benchmarks import harness
from faceembed.encoders import layers

BATCH = 32

# name: (layer, input shape)
FORMS: dict[str, tuple[Callable[..., nn.Module], tuple[int, int, int]]] = {
    "stem 3×3 s2, 3→16 @64": (functools.partial(layers.Conv3x3, 16, 2), (64, 64, 3)),
    "stem 3×3 s1, 3→64 @112": (functools.partial(layers.Conv3x3, 64), (112, 112, 3)),
    "3×3, 64→64 @56": (functools.partial(layers.Conv3x3, 64), (56, 56, 64)),
    "1×1, 64→128 @56": (functools.partial(layers.Conv1x1, 128), (56, 56, 64)),
    "1×1 s2, 64→128 @56": (functools.partial(layers.Conv1x1, 128, 2), (56, 56, 64)),
    "depthwise, 128 @56": (layers.DepthwiseConv, (56, 56, 128)),
    "depthwise s2, 128 @56": (functools.partial(layers.DepthwiseConv, 2), (56, 56, 128)),
    "global depthwise, 512 @7": (layers.GlobalDepthwise, (7, 7, 512)),
}


class _PlainPReLU(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        slope = self.param("slope", nn.initializers.constant(0.25), (x.shape[-1],), jnp.float32)
        return jnp.where(x > 0, x, slope * x)


class _PlainDepthwise(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", layers.depthwise_normal, (3, 3, 1, x.shape[-1]), jnp.float32)
        _, height, width, channels = x.shape
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        weights = kernel.reshape(9, channels)
        total = jnp.zeros((), x.dtype)
        for i in range(3):
            for j in range(3):
                total += x[:, i : i + height, j : j + width] * weights[3 * i + j]
        return total


# name: (ours, plain, input shape)
GRADIENTS: dict[str, tuple[nn.Module, nn.Module, tuple[int, int, int]]] = {
    "batch norm, 128 @56": (
        layers.batch_norm(name="bn", train=True, dtype="float32", axis_name=None),
        nn.BatchNorm(use_running_average=False), (56, 56, 128),
    ),
    "PReLU, 128 @56": (layers.PReLU(), _PlainPReLU(), (56, 56, 128)),
    "depthwise, 128 @56": (layers.DepthwiseConv(form="dots"), _PlainDepthwise(), (56, 56, 128)),
    "3×3, 64→64 @56": (layers.Conv3x3(64, form="dots"), layers.Conv3x3(64, form="conv"), (56, 56, 64)),
}  # fmt: skip


def call_of(layer: nn.Module, shape: tuple[int, int, int]) -> Callable[[], Any]:
    """() → value and gradient; a stem's images need no gradient, so there it is that of the kernel alone."""
    x = jax.random.normal(jax.random.key(0), (BATCH, *shape))
    target = jax.random.normal(
        jax.random.key(2), jax.eval_shape(lambda: layer.init_with_output(jax.random.key(1), x))[0].shape
    )
    variables = layer.init(jax.random.key(1), x)
    params = variables.get("params", {})
    others = {name: tree for name, tree in variables.items() if name != "params"}

    def loss(params: Any, x: jax.Array, target: jax.Array) -> jax.Array:
        y, _ = layer.apply({"params": params, **others}, x, mutable=list(others))
        return jnp.vdot(y, target)

    step = jax.jit(jax.value_and_grad(loss, argnums=0 if shape[-1] == 3 else (0, 1)))
    return lambda: jax.block_until_ready(step(params, x, target))


def run(*, quick: bool = False) -> list[dict[str, Any]]:
    """A row for each layer."""
    repeats, rows = (2 if quick else 9), []
    for name, (layer, shape) in list(FORMS.items())[: 2 if quick else None]:
        times = harness.interleave(
            {form: call_of(layer(form=form), shape) for form in ("dots", "conv")}, repeats=repeats
        )
        rows.append({"table": "forms", "layer": name, **harness.versus(times, "conv", "dots")})
    for name, (ours, plain, shape) in list(GRADIENTS.items())[: 2 if quick else None]:
        calls = {"by hand": call_of(ours, shape), "autodiff": call_of(plain, shape)}
        times = harness.interleave(calls, repeats=repeats)
        rows.append({"table": "gradients", "layer": name, **harness.versus(times, "autodiff", "by hand")})
    return rows


if __name__ == "__main__":
    harness.main(run)

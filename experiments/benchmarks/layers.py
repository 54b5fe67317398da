"""What do the two forms of each layer cost, and how fast does each encoder train, on this machine?

    python experiments/benchmarks/layers.py                    # layers and convnet, about a minute
    python experiments/benchmarks/layers.py --encoders mobilefacenet iresnet18 --batch 32
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python experiments/benchmarks/layers.py --devices 2

On CPU "dots" should win by far on 1×1 and depthwise layers, and on a stem at least not lose; elsewhere "conv" should:
`faceembed.encoders.layers.default_form` stands on this table. Times are the best of several calls; img/s is by the
clock and img/s·core by the processor seconds of all threads, which tell a busy machine from a slow program.
"""

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from faceembed.encoders import layers, make_encoder

PHOTO_SIZE = {"convnet": 64}

# name: (layer, input shape at batch 32)
LAYERS = {
    "stem 3x3 s2, 3→16 @64": (functools.partial(layers.Conv3x3, 16, 2), (64, 64, 3)),
    "stem 3x3 s1, 3→64 @112": (functools.partial(layers.Conv3x3, 64), (112, 112, 3)),
    "1x1, 64→128 @56": (functools.partial(layers.Conv1x1, 128), (56, 56, 64)),
    "1x1 s2, 64→128 @56": (functools.partial(layers.Conv1x1, 128, 2), (56, 56, 64)),
    "depthwise, 128 @56": (layers.DepthwiseConv, (56, 56, 128)),
    "depthwise s2, 128 @56": (functools.partial(layers.DepthwiseConv, 2), (56, 56, 128)),
    "global depthwise, 512 @7": (layers.GlobalDepthwise, (7, 7, 512)),
}

CONVNETS: tuple[dict[str, Any], ...] = (
    {},
    {"blocks": (1, 1, 1, 1)},
    {"widths": (24, 48, 96, 192)},
    {"widths": (32, 48, 96, 192)},
    {"widths": (16, 64, 128, 192)},
    {"widths": (32, 64, 128, 256)},
)


def best(call, repeats):
    """(wall seconds, processor seconds) of the quickest of `repeats` calls, compiled beforehand."""
    jax.block_until_ready(call())
    wall, processor = [], []
    for _ in range(repeats):
        start, spent = time.perf_counter(), time.process_time()
        jax.block_until_ready(call())
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - spent)
    return min(wall), min(processor)


def layer_seconds(layer, shape, batch, form, repeats):
    """Seconds of value and gradient; a stem's images need no gradient, so there it is that of the kernel alone."""
    x = jax.random.normal(jax.random.key(0), (batch, *shape))
    params = layer(form=form).init(jax.random.key(1), x)

    def loss(params, x):
        return jnp.sum(jnp.square(layer(form=form).apply(params, x)))

    step = jax.jit(jax.value_and_grad(loss, argnums=0 if shape[-1] == 3 else (0, 1)))
    return best(lambda: step(params, x), repeats)


def train_step(encoder, size, batch, devices):
    """(call, compile seconds): call() is one forward, backward and SGD update of `batch` photos over `devices`."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    replicated, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    images = jax.device_put(jax.random.normal(jax.random.key(0), (batch, size, size, 3)), split)
    init = jax.jit(functools.partial(encoder.init, train=False), out_shardings=replicated)
    variables = init(jax.random.key(1), images)
    target = jax.device_put(jax.random.normal(jax.random.key(2), (batch, encoder.dim)), split)

    def loss(params, statistics):
        collections = {"params": params, "batch_stats": statistics}
        embeddings, update = encoder.apply(collections, images, train=True, mutable=["batch_stats"])
        return jnp.mean(embeddings * target), update["batch_stats"]

    def step(variables):
        gradient, statistics = jax.grad(loss, has_aux=True)(variables["params"], variables["batch_stats"])
        params = jax.tree.map(lambda p, g: p - 1e-3 * g, variables["params"], gradient)
        return {"params": params, "batch_stats": statistics}

    start = time.perf_counter()
    compiled = jax.jit(step, out_shardings=replicated).lower(variables).compile()
    return functools.partial(compiled, variables), time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="*", default=[], help="time these instead of layers and convnet's variants")
    parser.add_argument("--batch", type=int, default=192, help="photos a training step (layers are timed at 32)")
    parser.add_argument("--devices", type=int, default=1, help="devices that share the batch")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.default_backend()}, {options.devices} of {jax.device_count()} devices")

    if not options.encoders:
        print(f"\n{'value + gradient, batch 32':28s} {'dots':>10s} {'conv':>10s}   (ms, wall)")
        for name, (layer, shape) in LAYERS.items():
            dots, conv = (layer_seconds(layer, shape, 32, form, options.repeats)[0] for form in ("dots", "conv"))
            print(f"{name:28s} {1e3 * dots:10.1f} {1e3 * conv:10.1f}", flush=True)

    print(f"\n{'training step':58s} {'params':>8s} {'compile':>8s} {'img/s':>7s} {'img/s·core':>10s}")
    for name, kwargs in [(name, {}) for name in options.encoders] or [("convnet", variant) for variant in CONVNETS]:
        encoder = make_encoder(name, dtype=options.dtype, **kwargs)
        call, compiling = train_step(encoder, PHOTO_SIZE.get(name, 112), options.batch, options.devices)
        wall, processor = best(call, options.repeats)
        size = sum(leaf.size for leaf in jax.tree.leaves(call()["params"]))
        label = " ".join([name, *(f"{key}={value}" for key, value in kwargs.items())])
        speeds = f"{options.batch / wall:7.0f} {options.batch / processor:10.0f}"
        print(f"{label:58s} {size / 1e6:7.2f}M {compiling:7.1f}s {speeds}", flush=True)


if __name__ == "__main__":
    main()

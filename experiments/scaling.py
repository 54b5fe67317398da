"""What would 8, 64 and 512 GPUs spend on mining and on talking to each other?  (Seconds; nothing is trained.)

    python -m experiments.scaling
    python -m experiments.scaling --photos-per-gpu 64 --miner-photos 8

Counts, and one set of assumptions to turn them into time. Counted: the encoder's FLOPs (XLA's own count of a forward
pass, times three), its parameters and batch norms; the products and comparisons of the miner; the bytes of each
collective, which are those that tests/test_tiled.py and tests/test_step.py find in compiled updates. The miner is `all`.
Assumed: what a GPU
and its links achieve, see `Machine`. Nothing here was measured on GPUs.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp

from faceembed import config, embed, report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What is assumed to be achieved, not what a data sheet says: about 0.4 of an H100's peaks and 0.8 of its links'."""

    encoder_flops: float = 4e14
    """FLOP/s of bfloat16 convolutions."""
    mining_flops: float = 2.5e13
    """FLOP/s of float32 products without TF32, which would round distances to 10 bits."""
    comparisons: float = 2e12
    """Distances compared with a threshold and counted, a second."""
    within: float = 3.5e11
    """Bytes/s a GPU sends to others of its host (NVLink)."""
    between: float = 4e10
    """Bytes/s a GPU sends to other hosts (400 Gbit/s a GPU)."""
    latency: float = 2e-5
    """Seconds that the smallest all-reduce takes."""
    per_host: int = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """Counted once for any number of GPUs."""

    flops: float
    """Of a forward pass of one photo."""
    parameters: int
    norms: int
    """Batch normalisations; each sums its statistics over all devices, once forward and once backward."""
    dim: int


def counted(name: str) -> Encoder:
    """An encoder's counts at its native 112 px and d=512."""
    choice = dataclasses.replace(config.CHOICES["encoder"][name], dim=512)
    experiment = config.Experiment(encoder=choice)
    encoder = embed.build_encoder(experiment)
    images = jax.ShapeDtypeStruct((1, 112, 112, 3), jnp.float32)
    variables = jax.eval_shape(lambda key, x: encoder.init(key, x, train=False), jax.random.key(0), images)
    analysis = jax.jit(lambda v, x: encoder.apply(v, x, train=False)).lower(variables, images).cost_analysis() or {}
    return Encoder(
        flops=float(analysis["flops"]),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        norms=len(jax.tree.leaves(variables.get("batch_stats", {}))) // 2,
        dim=512,
    )


def spent(encoder: Encoder, machine: Machine, *, gpus: int, photos_per_gpu: int, photos: int) -> dict[str, float | int]:
    """Counts and milliseconds of one update on one GPU.

    Args:
      encoder: counts.
      machine: assumptions.
      gpus: N.
      photos_per_gpu: b; the batch has B = N·b photos.
      photos: K, of each person.
    """
    batch = gpus * photos_per_gpu
    link = machine.within if gpus <= machine.per_host else machine.between
    passed = (gpus - 1) / gpus
    pairs = photos_per_gpu * batch
    # One product for the distances and two for their derivative; each pair meets K-1 thresholds three times (sum, count
    # and weight).
    products, comparisons = 3 * 2 * pairs * encoder.dim, 3 * (photos - 1) * pairs
    gathered = passed * batch * (4 * encoder.dim + 4)
    scattered = passed * batch * 4 * encoder.dim
    reduced = 2 * passed * 4 * encoder.parameters
    several = gpus > 1
    return {
        "GPUs": gpus,
        "B": batch,
        "encoder ms": 3e3 * photos_per_gpu * encoder.flops / machine.encoder_flops,
        "mining GFLOP": products / 1e9,
        "mining ms": 1e3 * (products / machine.mining_flops + comparisons / machine.comparisons),
        "a table would be MB": 4 * pairs / 1e6,
        "gather MB": gathered / 1e6,
        "scatter MB": scattered / 1e6,
        "embeddings ms": 1e3 * (gathered + scattered) / link,
        "gradient MB": reduced / 1e6,
        "gradient ms": 1e3 * reduced / link,
        "norms ms": 1e3 * several * 2 * encoder.norms * machine.latency,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="iresnet100", choices=config.CHOICES["encoder"])
    parser.add_argument("--photos-per-gpu", type=int, default=128)
    parser.add_argument("--miner-photos", type=int, default=4, help="K, photos of each person in a batch")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    options = parser.parse_args()
    encoder, machine = counted(options.encoder), Machine()
    print(
        f"{options.encoder}: {encoder.parameters:,} parameters, {encoder.flops / 1e9:.1f} GFLOP a photo forward, "
        f"{encoder.norms} batch norms, d={encoder.dim}; b={options.photos_per_gpu} photos a GPU, K={options.miner_photos}\n"
    )
    rows = [
        spent(encoder, machine, gpus=n, photos_per_gpu=options.photos_per_gpu, photos=options.miner_photos)
        for n in options.gpus
    ]
    print(report.table(rows))
    assumed = ", ".join(f"{field.name} {getattr(machine, field.name):g}" for field in dataclasses.fields(machine))
    print(f"\nassumed: {assumed}")


if __name__ == "__main__":
    main()

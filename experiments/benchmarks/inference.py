"""How many photos a second are embedded, beside the same networks in PyTorch?  (2 min on 2 cores.)

    python -m experiments.benchmarks.inference

uint8 photos of 112 px in, unit vectors out, float32, no flip fusion; normalising is part of it on both sides. faceembed's
compiled function of `embed.make_embed`, as `Embedder` calls it, against PyTorch in eager evaluation mode, channels last,
under `inference_mode`. Both have the same parameters and batch statistics, and their embeddings are asserted to agree to
1e-4. No bar is set.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import harness
from faceembed import embed
from faceembed.encoders import make_encoder
from faceembed.preprocess import Preprocess

SIZE = 112
NETWORKS = ("mobilefacenet", "iresnet18")
BATCHES = (1, 32)
TOLERANCE = 1e-4


def photos(batch: int) -> np.ndarray:
    """uint8 noise [batch, SIZE, SIZE, 3]."""
    return np.random.default_rng(0).integers(0, 256, (batch, SIZE, SIZE, 3), dtype=np.uint8)


def variables_of(name: str) -> dict[str, Any]:
    """{"params", "batch_stats"} with no number left at its initial value, so that a layer left out would show."""
    images = jnp.zeros((1, SIZE, SIZE, 3))
    variables = jax.jit(lambda key: make_encoder(name).init(key, images, train=False))(jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x * rng.uniform(0.8, 1.2, x.shape) + rng.uniform(0, 0.02, x.shape), variables)


def ours(name: str, variables: dict[str, Any], batch: int) -> Callable[[], np.ndarray]:
    """faceembed's () → embeddings [batch, d]."""
    images, preprocess = photos(batch), Preprocess(size=SIZE, flip="none")
    function = embed.make_embed(make_encoder(name), preprocess)
    kept = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), variables)
    return lambda: np.asarray(function(kept, images))


def peers(name: str, variables: dict[str, Any], batch: int) -> Callable[[], np.ndarray]:
    """PyTorch's () → embeddings [batch, d]."""
    from experiments.benchmarks import peers

    torch = harness.pytorch()
    device, images, preprocess = harness.torch_device(), photos(batch), Preprocess(size=SIZE)
    network: Any = peers.network(name, variables).eval()
    network.to(device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def call() -> np.ndarray:
        # Seen as [b, 3, h, w], photos of [b, h, w, 3] are channels last already.
        x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float()
        x = x.sub_(preprocess.mean).div_(preprocess.scale)
        return torch.nn.functional.normalize(network(x)).cpu().numpy()

    return call


def row(name: str, batch: int, repeats: int, peer: bool) -> dict[str, Any]:
    """One network at one batch size, timed in this process."""
    variables = variables_of(name)
    # On a GPU both sides would otherwise round to TF32, each in its own places.
    jax.config.update("jax_default_matmul_precision", "highest")
    contestants: dict[str, Callable[[], np.ndarray]] = {"faceembed": ours(name, variables, batch)}
    if peer:
        contestants["PyTorch"] = peers(name, variables, batch)
        first, second = (call() for call in contestants.values())
        np.testing.assert_allclose(first, second, atol=TOLERANCE, err_msg=f"{name}: the two do not compare")
    times = harness.interleave(contestants, repeats=repeats)
    return {"network": name, "batch": batch, **harness.threads(), **harness.versus(times, "PyTorch", images=batch)}


def run(*, quick: bool = False) -> list[dict[str, Any]]:
    """A row for each network and batch size."""
    peer = harness.available("torch")
    cases = [(name, batch) for name in NETWORKS for batch in BATCHES]
    return [
        harness.fresh(row, name, batch, 3 if quick else 15, peer) for name, batch in (cases[:1] if quick else cases)
    ]


if __name__ == "__main__":
    harness.main(run)

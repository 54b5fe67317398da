"""How long does a training step take, beside the same step in PyTorch?  (6 min on 2 cores.)

    python -m experiments.benchmarks.step

One update of `mobilefacenet` and `iresnet18`, 32 photos of 112 px (8 people × 4), float32: uint8 photos, normalising,
encoder in training mode, batch-hard triplet loss, gradient clipping, AdamW with decay on kernels alone, moving averages of
parameters and batch statistics. faceembed's is `training.step.make_train_step` as `train` compiles it, without
augmentation; PyTorch's is eager, channels last, its optimizer and averages fused over tensors (`foreach`).

That both do the same work is asserted: as many trained parameters, and in the first step the same loss and the same
length of the gradient (relative 1e-3). "ratio" is how many times as fast as PyTorch we are, round by round.

Huge pages: under `launch.py` the C library asks for pages of 2 MB for large arrays, and so it does here, for both sides,
in the rows that say so. Without them each step of ours spends up to half of its time on being given its temporary memory
in pages of 4 kB, which it takes and gives back as one piece; PyTorch keeps most of its pieces.

Bar: 1.0, as near as can be.

What did not pay on XLA's CPU back end (see `layers` for what did): a depthwise gradient taken in bands of rows, 1.4 times
as long as now once pages are huge (without, 0.4 times: it only dodged the new pages); automatic differentiation of
depthwise layers with strides, quicker by itself and slower in the network; a convolution split by rows, by photos or by
features so that both cores have work; freeing less (mallopt) in place of huge pages, 1.3 times as long. jax 0.10 gives
convolutions of 64 channels to a library that runs them on one core: iresnet18 takes three quarters of its time there with
XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE. jax 0.12 does not and
needs no flag, so none is set.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import harness
from faceembed import losses, preprocess
from faceembed import mesh as meshes
from faceembed.encoders import make_encoder
from faceembed.training import step as steps

SIZE, PEOPLE, PHOTOS = 112, 8, 4
NETWORKS = ("mobilefacenet", "iresnet18")
MARGIN, RATE, DECAY, CLIP, EMA = 0.2, 1e-3, 1e-2, 1.0, 0.999
TOLERANCE = 1e-3


def batch() -> dict[str, np.ndarray]:
    """Photos of noise with a trace of their person."""
    identity = np.arange(PEOPLE * PHOTOS, dtype=np.int32) // PHOTOS
    noise = np.random.default_rng(0).integers(0, 200, (len(identity), SIZE, SIZE, 3))
    image = (noise + 7 * identity[:, None, None, None]).astype(np.uint8)
    return {"image": image, "identity": identity, "slot": np.arange(len(identity), dtype=np.int32)}


def variables_of(name: str) -> dict[str, Any]:
    """Fresh {"params", "batch_stats"}, the same for both sides."""
    images = jnp.zeros((1, SIZE, SIZE, 3))
    return jax.jit(lambda key: make_encoder(name).init(key, images, train=False))(jax.random.key(0))


def ours(name: str) -> Callable[[], tuple[float, float]]:
    """() → (loss, length of the gradient) before one more update."""
    mesh, encoder, pre = meshes.make_mesh(1), make_encoder(name), preprocess.Preprocess(size=SIZE)
    optimizer, _ = steps.make_optimizer(
        optax.scale_by_adam(), learning_rate=RATE, warmup=0, steps=10**6, weight_decay=DECAY, clip_norm=CLIP
    )
    variables = variables_of(name)
    params = {"encoder": variables["params"], "loss": {}}
    state = steps.TrainState(
        step=jnp.int32(0), skipped=jnp.int32(0), params=params, batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, {"params": variables["params"], "batch_stats": variables["batch_stats"]}),
    )  # fmt: skip
    shardings = meshes.state_sharding(mesh, state)
    update = steps.make_train_step(
        encoder,
        lambda emb, identity, _, __, ___, ____, axis: losses.triplet_loss(
            emb, identity, margin=MARGIN, miner="hardest", axis_name=axis
        ),
        optimizer, lambda _, __, images: preprocess.normalize(pre, images), seed=0, ema=EMA, mesh=mesh,
        shardings=shardings,
    )  # fmt: skip
    kept = [jax.device_put(state, shardings)]
    moved = next(meshes.to_devices([batch()], mesh))

    def call() -> tuple[float, float]:
        kept[0], metrics = jax.block_until_ready(update(kept[0], moved))
        return float(metrics["loss"]), float(metrics["grad_norm"])

    return call


def peer(name: str) -> Callable[[], tuple[float, float]]:
    """PyTorch's () → (loss, length of the gradient) before one more update."""
    from experiments.benchmarks import peers

    torch = harness.pytorch()
    device, pre, host = harness.torch_device(), preprocess.Preprocess(size=SIZE), batch()
    network: Any = peers.network(name, variables_of(name)).train()
    network.to(device, memory_format=torch.channels_last)
    named = [(path, p) for path, p in network.named_parameters() if p.requires_grad]
    # Decay on kernels alone: a norm's scale and a PReLU's slope are vectors.
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for _, p in named if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=1e-8, foreach=True)
    trained = [p for _, p in named]
    averaged = [*trained, *(b for b in network.buffers() if b.is_floating_point())]
    averages = [x.detach().clone() for x in averaged]
    identity = torch.from_numpy(host["identity"]).to(device)
    same = identity[:, None] == identity[None, :]
    positive = same & ~torch.eye(len(same), dtype=torch.bool, device=device)

    def call() -> tuple[float, float]:
        x = torch.from_numpy(host["image"]).to(device).permute(0, 3, 1, 2).float().sub_(pre.mean).div_(pre.scale)
        emb = torch.nn.functional.normalize(network(x))
        distance = 2 - 2 * emb @ emb.T
        farthest = distance.masked_fill(~positive, -torch.inf).amax(1)
        closest = distance.masked_fill(same, torch.inf).amin(1)
        loss = (farthest - closest + MARGIN).clamp(min=0).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, [x.detach() for x in averaged], 1 - EMA)
        return loss.item(), norm.item()  # on a GPU this waits, as block_until_ready does

    return call


def row(name: str, repeats: int, with_peer: bool) -> dict[str, Any]:
    """One network, timed in this process."""
    # On a GPU both sides would otherwise round to TF32, each in its own places.
    jax.config.update("jax_default_matmul_precision", "highest")
    contestants: dict[str, Callable[[], tuple[float, float]]] = {"faceembed": ours(name)}
    if with_peer:
        contestants["PyTorch"] = peer(name)
        first, second = (call() for call in contestants.values())
        np.testing.assert_allclose(first, second, rtol=TOLERANCE, err_msg=f"{name}: the two do not compare")
        counts = _parameters(name)
        if counts[0] != counts[1]:
            raise AssertionError(f"{name}: {counts[0]:,} trained parameters here, {counts[1]:,} in the peer.")
    times = harness.interleave(contestants, repeats=repeats)
    return {"network": name, **harness.threads(), **harness.versus(times, "PyTorch", images=PEOPLE * PHOTOS)}


def _parameters(name: str) -> tuple[int, int]:
    from experiments.benchmarks import peers

    variables = variables_of(name)
    here = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return here, peers.parameters(peers.network(name, variables))


def run(*, quick: bool = False) -> list[dict[str, Any]]:
    """Two rows for each network."""
    with_peer = harness.available("torch")
    return [
        {"huge pages": "yes" if huge else "no"}
        | harness.fresh(row, name, 2 if quick else 5, with_peer, huge_pages=huge)
        for name in (NETWORKS[:1] if quick else NETWORKS)
        for huge in (True, False)
    ]


if __name__ == "__main__":
    harness.main(run)

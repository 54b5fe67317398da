"""Value and gradient of a batch that is encoded chunk by chunk, since its activations do not fit into memory at once.

`cached` is exact for any loss: all embeddings are there when it is computed. It encodes every photo twice, first without
and then with what a gradient needs. `accumulated` encodes once, and gives every chunk a loss of its own: that is the loss
of the batch only where it is a mean over photos, as softmax losses are. For both, batch normalisation and dropout are the
encoder's matter; each chunk is normalised by its own moments.

Chunk k of n takes from every device the photos k, k + n, k + 2n, … of those that it has anyway: no photo moves between
devices, any number of devices makes the same chunks, and neighbours, which a P×K batch has of the same person, come into
different ones.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from faceembed.mesh import DATA

Encode = Callable[[Any, Any], tuple[jax.Array, Any]]
"""(parameters of the encoder, photos: a tree of [b, …]) → (emb [b, d], a tree of what else is to be kept)."""
Cost = Callable[[jax.Array, Any, Any], tuple[jax.Array, dict[str, jax.Array]]]
"""(emb [b, d], photos, parameters of the loss) → (scalar loss of all devices, its metrics)."""
Result = tuple[jax.Array, dict[str, jax.Array], jax.Array, Any, Any]
"""(loss, metrics, emb [B, d] in the order of the batch, what else `Encode` gave as a tree of [n, …], gradient)."""


def take(tree: Any, chunk: jax.Array, chunks: int, mesh: Mesh) -> Any:
    """One chunk of a tree of [B, …] that is divided over the mesh's data axis: [B / chunks, …], divided likewise."""

    def own(tree: Any, chunk: jax.Array) -> Any:
        split = jax.tree.map(lambda x: x.reshape(-1, chunks, *x.shape[1:]), tree)
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, chunk, 1, keepdims=False), split)

    return jax.shard_map(
        own, mesh=mesh, in_specs=(PartitionSpec(DATA), PartitionSpec()), out_specs=PartitionSpec(DATA)
    )(tree, chunk)


def join(x: jax.Array, mesh: Mesh) -> jax.Array:
    """[B, …] in the order of the batch from its chunks [chunks, B / chunks, …], without moving a photo."""

    def own(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    return jax.shard_map(own, mesh=mesh, in_specs=PartitionSpec(None, DATA), out_specs=PartitionSpec(DATA))(x)


def cached(encode: Encode, cost: Cost, params: Any, photos: Any, *, chunks: int, mesh: Mesh, shardings: Any) -> Result:
    """Loss and gradient of the whole batch with the activations of one chunk at a time (Gao et al. 2021, GradCache).

    The gradient by the embeddings is taken on all of them, kept, and then led back through the encoder chunk by chunk:
    what the chain rule gives for the undivided batch, if `encode` treats a photo alike in any company.

    Args:
      encode: called twice a chunk; it has to draw the same random numbers both times.
      cost: called once.
      params: {"encoder": …, "loss": …}.
      photos: a tree of [B, …].
      chunks: n; it divides the photos of each device.
      mesh: the photos are divided over its data axis.
      shardings: of `params`.
    """
    steps = jnp.arange(chunks)
    emb, kept = jax.lax.map(lambda k: encode(params["encoder"], take(photos, k, chunks, mesh)), steps)
    emb = join(emb, mesh)
    both = jax.value_and_grad(lambda emb, loss: cost(emb, photos, loss), (0, 1), has_aux=True)
    (value, metrics), (by_emb, by_loss) = both(emb, params["loss"])

    def back(total: Any, k: jax.Array) -> tuple[Any, None]:
        part = take(photos, k, chunks, mesh)
        _, pull = jax.vjp(lambda encoder: encode(encoder, part)[0], params["encoder"])
        return jax.tree.map(jnp.add, total, *pull(take(by_emb, k, chunks, mesh))), None

    by_encoder, _ = jax.lax.scan(back, _zeros(params["encoder"], shardings["encoder"]), steps)
    return value, metrics, emb, kept, {"encoder": by_encoder, "loss": by_loss}


def accumulated(
    encode: Encode, cost: Cost, params: Any, photos: Any, *, chunks: int, mesh: Mesh, shardings: Any
) -> Result:
    """The mean of the losses that the chunks have by themselves, its gradient, and the mean of their metrics.

    Args and returns as for `cached`; `encode` and `cost` are called once a chunk.
    """

    def objective(params: Any, part: Any) -> tuple[jax.Array, Any]:
        emb, kept = encode(params["encoder"], part)
        value, metrics = cost(emb, part, params["loss"])
        return value, (metrics, emb, kept)

    def add(total: Any, k: jax.Array) -> tuple[Any, Any]:
        found, grads = jax.value_and_grad(objective, has_aux=True)(params, take(photos, k, chunks, mesh))
        return jax.tree.map(jnp.add, total, grads), found

    total, (values, (metrics, emb, kept)) = jax.lax.scan(add, _zeros(params, shardings), jnp.arange(chunks))
    value, metrics = jax.tree.map(lambda x: jnp.mean(x, 0), (values, metrics))
    return value, metrics, join(emb, mesh), kept, jax.tree.map(lambda x: x / chunks, total)


def _zeros(params: Any, shardings: Any) -> Any:
    """A sum of gradients to begin with; what is divided of the parameters is divided of it, too."""
    return jax.lax.with_sharding_constraint(jax.tree.map(jnp.zeros_like, params), shardings)

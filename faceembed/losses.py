"""What triplets and pairs cost: losses over the global batch, equal for any number of devices.

Each loss is a pure function `(emb, identity, …) → (loss, metrics)`. Metrics are float scalars without gradient; loss
and metrics are those of the whole batch, on every device. Where the batch lies decides `axis_name`:

* under `jax.jit` on a global array, divided or not: `axis_name=None`;
* under `jax.shard_map`: the mesh axis. Differentiate OUTSIDE:
  `jax.grad(lambda emb: jax.shard_map(loss, …, out_specs=P())(emb, identity))` is right as it is;
* under `jax.pmap`: its axis. Differentiate outside likewise: `jax.grad(lambda emb: jax.pmap(loss, …)(emb, ids)[0])`.
  Inside, `jax.grad` sees one copy of the loss a device and returns the derivative of their SUM with respect to this
  device's copy of the parameters: `lax.pmean` over the axis is then the gradient, `lax.psum` is n_devices too large.

Distances and losses are computed in float32, or in float64 where the embeddings are. Distances are those of general
vectors: unit length is the encoder's business.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec

from faceembed import mining, tiled

QUANTILES = {"q10": 0.1, "q50": 0.5, "q90": 0.9}
TABLE = 2**20
"""Distances up to which a table of all of them is made rather than slabs, 4 MiB of float32."""
CHUNK = 2**21
"""Most elements of the [chunk, b, d] differences that `pair_logistic_loss` holds at once, or those of one photo."""

AxisName = str | tuple[str, ...] | None


class Gathered(NamedTuple):
    """A batch as the device sees it that mines its own part.

    Attributes:
      anchors: [b, d] float32 or float64 embeddings of this device.
      everyone: [B, d], those of all devices.
      row: [b] int32 global index of the anchors.
      identity: [B] int person ids of everyone.
    """

    anchors: Array
    everyone: Array
    row: Array
    identity: Array


class Memory(NamedTuple):
    """Embeddings of recent batches, newest first, the same on every device (Wang et al. 2020, Cross-Batch Memory).

    Attributes:
      emb: [m, d] float.
      identity: [m] int32 person ids.
      filled: [m] bool, False where nothing was remembered yet.
    """

    emb: Array
    identity: Array
    filled: Array


def init_memory(size: int, dim: int, dtype: Any = jnp.float32) -> Memory:
    """A memory of `size` ≥ 1 embeddings [dim] with nothing in it."""
    return Memory(jnp.zeros((size, dim), dtype), jnp.zeros(size, jnp.int32), jnp.zeros(size, bool))


def remember(memory: Memory, emb: Array, identity: Array) -> Memory:
    """The memory with a batch in front: emb [B, d], identity [B] int; what no longer fits is forgotten."""
    new = Memory(
        lax.stop_gradient(emb).astype(memory.emb.dtype), identity.astype(jnp.int32), jnp.ones(len(identity), bool)
    )
    size = len(memory.filled)
    return Memory(*(jnp.concatenate([front, back])[:size] for front, back in zip(new, memory, strict=True)))


def triplet_loss(
    emb: Array,
    identity: Array,
    *,
    margin: float | Array,
    miner: str = "semi_hard",
    key: Array | None = None,
    axis_name: AxisName = None,
    tile: int | None = None,
    memory: Memory | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Triplet loss with online mining: mean of max(d(A,P) - d(A,N) + α, 0) (Schroff et al. 2015, eq. 3).

    With `random`, `hardest` and `semi_hard` the mean is over the chosen triplets, satisfied ones included; with `all`
    and `semi_hard_all` over the triplets with a positive hinge (and d(A,N) > d(A,P)) alone. Without any the loss is 0.

    Args:
      emb: [b, d] float embeddings of this device, of any length; d(a, b) = |a - b|².
      identity: [b] int person ids; one id may appear on several devices.
      margin: α ≥ 0, in units of squared distance.
      miner: a name in `mining.MINERS`.
      key: JAX random key, the same on all devices; needed by `random` alone.
      axis_name: axis of shard_map or pmap to gather over; None for one device or a global array under jit.
      tile: at how many candidates a device looks at a time. 0 makes the table of all b·B distances (`hardest` and `random`
        never do); None makes it where it has at most `TABLE` of them, and takes slabs of a size that suits the processor
        elsewhere: value, metrics and gradient are equal but for rounding, and memory is linear in B. Under jit the slabs
        are divided over devices, by shard_map, if the embeddings were made from arrays that lie divided over a mesh, or
        under `jax.set_mesh`; of NumPy arrays that jit itself divides (`in_shardings`) it is not known when the loss is
        traced.
      memory: embeddings of earlier batches, the same on all devices, as more negatives; they get no gradient.

    Returns:
      (loss, metrics). Metrics:
        triplets: valid triplets. Index miners: those chosen. Reducers: all (A, P, N) of the batch.
        active: the share of them that the loss pushes on: hinge > 0 (and d(A,N) > d(A,P) for `semi_hard_all`).
        d_ap_mean, d_an_mean: an anchor's mean d(A,P) and mean d(A,N) over its valid triplets, averaged over the
          anchors that have any.
        d_ap_q10, d_ap_q50, d_ap_q90, d_an_q10, …: quantiles over the same anchors of the same means, interpolated
          linearly. All are 0 where there is no triplet.

    Raises:
      ValueError: shapes, dtypes, margin, miner or key do not fit.

    References:
      Schroff, Kalenichenko, Philbin 2015, FaceNet, eq. 3. Hermans, Beyer, Leibe 2017, eqs. 5 and 8.
    """
    _check(emb, identity, margin)
    if miner not in mining.MINERS:
        raise ValueError(f"miner is {miner!r}, which does not exist; try one of {', '.join(mining.MINERS)}.")
    if miner == "random" and key is None:
        raise ValueError("miner 'random' draws its triplets and needs a key; pass key=jax.random.key(seed).")
    if tile is not None and tile < 0:
        raise ValueError(f"tile is {tile}: it counts candidates; 0 for a table of all distances, None to choose.")
    remembered = 0 if memory is None else len(memory.filled)
    # What one device would do alone decides; divided, each may find that a table of its own part is small enough.
    if axis_name is None and (mesh := _mesh_of(emb)) and _slabs_needed(len(emb), len(emb) + remembered, tile):
        axes = tuple(mesh.axis_names)
        loss = partial(triplet_loss, margin=margin, miner=miner, axis_name=axes, tile=tile)
        call = lambda emb, identity, key, memory: loss(emb, identity, key=key, memory=memory)  # noqa: E731
        divided, same = PartitionSpec(axes), PartitionSpec()
        specs = (divided, divided, same, same)
        return jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=same)(emb, identity, key, memory)
    batch = gather(emb, identity, axis_name)
    return gathered_triplet_loss(
        batch, margin=margin, miner=miner, key=key, axis_name=axis_name, tile=tile, memory=memory
    )


def gathered_triplet_loss(
    batch: Gathered,
    *,
    margin: float | Array,
    miner: str,
    key: Array | None = None,
    axis_name: AxisName = None,
    tile: int | None = None,
    memory: Memory | None = None,
) -> tuple[Array, dict[str, Array]]:
    """`triplet_loss` of a batch that is gathered already: for those who mine one batch in several ways.

    Args: as for `triplet_loss`, with `batch` from `gather`.
    """
    anchors, everyone, row, identities = batch
    candidates = everyone
    if memory is None:
        layout = mining.layout_of(row, identities)
    else:
        memory = Memory(*map(jnp.asarray, memory))
        layout = mining.layout_of(row, identities, memory.identity, memory.filled)
        candidates = jnp.concatenate([everyone, lax.stop_gradient(memory.emb).astype(everyone.dtype)])
    # One margin an anchor: its cotangent is then as local to the device as that of the anchors.
    margins = mining.varying_zeros(layout, (), anchors.dtype) + jnp.asarray(margin, anchors.dtype)
    slabs = _slabs_needed(len(anchors), len(candidates), tile)
    if miner in mining.REDUCERS:
        if slabs:
            total, counted = tiled.band_sum(
                layout, anchors, candidates, margins, farther_only=miner == "semi_hard_all", tile=tile
            )
            d_ap, d_an = tiled.mean_distances(layout, *lax.stop_gradient((anchors, candidates)))
        else:
            distance = mining.squared_distances(anchors, candidates)
            total, counted = mining.REDUCERS[miner](layout, distance, margins)
            d_ap, d_an = _mean_distances(layout, lax.stop_gradient(distance))
        valid, in_mean = layout.positives * layout.negatives, counted
    elif miner == "semi_hard" and slabs:
        total, counted, valid, d_ap, d_an = tiled.semi_hard(layout, anchors, candidates, margins, tile=tile)
        in_mean = valid
    else:
        options = {"width": tile} if miner == "hardest" and tile else {}
        fixed = lax.stop_gradient((anchors, candidates))
        triplets = mining.INDEX_MINERS[miner](layout, *fixed, key, **options)
        total, counted, valid, d_ap, d_an = _listed(anchors, candidates, margins, triplets)
        in_mean = valid
    dtype = anchors.dtype
    sums = [jnp.sum(x.astype(dtype)) for x in (total, in_mean, counted, valid)]
    all_total, all_in_mean, all_counted, all_valid = _psum(sums, axis_name)
    loss = all_total / jnp.maximum(all_in_mean, 1)
    metrics = {"triplets": all_valid, "active": all_counted / jnp.maximum(all_valid, 1)}
    metrics |= _spread(lax.stop_gradient({"d_ap": d_ap, "d_an": d_an}), valid > 0, layout, axis_name)
    return loss, lax.stop_gradient(metrics)


def _mesh_of(emb: Array) -> Any:
    """The mesh of several devices that an array under jit lies on, or that is set, if their number divides its rows."""
    mesh = jax.typeof(emb).sharding.mesh
    if mesh.empty:
        mesh = jax.sharding.get_abstract_mesh()
    usable = not mesh.empty and mesh.size > 1 and len(emb) % mesh.size == 0
    # Inside shard_map the axes are Manual: the array is this device's already.
    return mesh if usable and all(kind == AxisType.Auto for kind in mesh.axis_types) else None


def _slabs_needed(anchors: int, candidates: int, tile: int | None) -> bool:
    return anchors * candidates > TABLE if tile is None else tile > 0


def grouped_triplet_loss(
    emb: Array, identity: Array, *, groups: int, key: Array | None = None, axis_name: AxisName = None, **options: Any
) -> tuple[Array, dict[str, Array]]:
    """Triplet loss of a batch that is mined in separate groups, as so many devices would that do not gather.

    The global batch is cut into `groups` contiguous parts of equal size; an anchor meets the photos of its own part
    alone. The loss is the mean over the groups of each group's `triplet_loss`, a group without triplets counting 0: what
    averaging the gradients of devices that mine alone descends (DistributedDataParallel). It is the same for any number of
    real devices. Where `groups` is a multiple of that number no embedding is gathered; where it is not, every device
    gathers the batch and takes whole groups of it. Groups of one device follow one another.

    A person whose photos lie in two groups is two people with fewer photos each. P×K batches of people with K photos or
    more keep everybody whole where K divides the group; people with fewer photos, fillers and singletons shift the rest
    of the batch, and singletons, which stand at its end, all fall to the last groups.

    Args:
      emb: [b, d] float embeddings of this device.
      identity: [b] int person ids.
      groups: G ≥ 1, which divides the global batch; 1 is `triplet_loss`.
      key: as for `triplet_loss`; each of several groups draws by its own number folded in.
      axis_name: as for `triplet_loss`.
      options: the other arguments of `triplet_loss`.

    Returns:
      (loss, metrics). Metrics are those of `triplet_loss`: triplets is the sum over the groups; every other is the mean of
      the groups' own, weighted by their triplets, so `active` is the share of all triplets and a quantile is a mean of
      quantiles.

    Raises:
      ValueError: the batch does not divide into the groups, or as `triplet_loss`.
    """
    if groups == 1:
        return triplet_loss(emb, identity, key=key, axis_name=axis_name, **options)
    _check(emb, identity, 0.0)
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    size = devices * emb.shape[0]
    if groups < 1 or size % groups:
        near = min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: abs(n - groups))
        raise ValueError(
            f"groups is {groups}, and a batch of {size} photos does not divide into so many; "
            f"pass a divisor of {size}, such as {near}."
        )
    each = -(-groups // devices)
    number = jnp.arange(each, dtype=jnp.int32)
    if axis_name is not None:
        number += each * lax.axis_index(axis_name)
    gathers = groups % devices > 0
    if gathers:
        emb, identity = (lax.all_gather(x, axis_name, tiled=True) for x in (emb, identity))
    parts = [x.reshape(-1, size // groups, *x.shape[1:]) for x in (emb, identity)]
    # The last devices may find no group left; they take one that exists, and it does not count.
    counts = number < groups
    if gathers:
        parts = [x[jnp.where(counts, number, 0)] for x in parts]

    def alone(group: tuple[Array, Array, Array]) -> tuple[Array, dict[str, Array]]:
        of_group = None if key is None else jax.random.fold_in(key, group[2])
        return triplet_loss(group[0], group[1], key=of_group, **options)

    values, metrics = lax.map(alone, (*parts, number))
    triplets = jnp.where(counts, metrics["triplets"], 0)
    sums = {name: jnp.sum(triplets * x) for name, x in metrics.items()}
    total, every, sums = _psum((jnp.sum(jnp.where(counts, values, 0)), jnp.sum(triplets), sums), axis_name)
    means = {name: x / jnp.maximum(every, 1) for name, x in sums.items()}
    return total / groups, lax.stop_gradient(means | {"triplets": every})


def contrastive_loss(
    emb: Array, identity: Array, *, margin: float | Array, axis_name: AxisName = None
) -> tuple[Array, dict[str, Array]]:
    """Siamese contrastive loss over all pairs of the global batch (Hadsell, Chopra, LeCun 2006, eq. 4).

    A genuine pair costs ½D², an impostor pair ½ max(margin - D, 0)², with D = |a - b| not squared. Impostor pairs
    outnumber genuine ones by far, so each kind is averaged by itself: the loss is the mean over genuine pairs plus the
    mean over impostor pairs, each 0 where there is none. The gradient of an impostor pair with D = 0, which has no
    direction, is taken as 0.

    Args:
      emb: [b, d] float embeddings of this device.
      identity: [b] int person ids.
      margin: ≥ 0, in units of D.
      axis_name: as for `triplet_loss`.

    Returns:
      (loss, metrics). Metrics: genuine, impostor: how many pairs {a, b}; loss_genuine, loss_impostor: the two means;
      d_genuine, d_impostor: mean D²; active: the share of impostor pairs with D < margin.

    Raises:
      ValueError: shapes, dtypes or margin do not fit.
    """
    _check(emb, identity, margin)
    anchors, everyone, row, identities = gather(emb, identity, axis_name)
    distance = mining.squared_distances(anchors, everyone)
    genuine, impostor = _kinds(row, identities)
    # "Not at 0" rather than "above": NaN must reach the loss.
    apart = ~(distance <= 0)
    # The inner where keeps sqrt's infinite slope at 0 out of the gradient.
    euclidean = jnp.where(apart, jnp.sqrt(jnp.where(apart, distance, 1)), 0)
    lack = jnp.maximum(jnp.asarray(margin, anchors.dtype) - euclidean, 0)
    means, pairs = _means_by_kind(
        (genuine, impostor),
        ({"loss": distance / 2, "d": distance}, {"loss": lack**2 / 2, "d": distance, "active": lack > 0}),
        axis_name,
    )
    loss = means[0]["loss"] + means[1]["loss"]
    metrics = {
        "genuine": pairs[0],
        "impostor": pairs[1],
        "loss_genuine": means[0]["loss"],
        "loss_impostor": means[1]["loss"],
        "d_genuine": means[0]["d"],
        "d_impostor": means[1]["d"],
        "active": means[1]["active"],
    }
    return loss, lax.stop_gradient(metrics)


def pair_logistic_loss(
    emb: Array, identity: Array, params: dict[str, Array], *, axis_name: AxisName = None
) -> tuple[Array, dict[str, Array]]:
    """Logistic regression on |f(a)-f(b)| over all pairs of the global batch, trained through both tied encoders.

    The logit of "same person" is z = Σ_k weights_k |f(a)_k - f(b)_k| + bias (Taigman et al. 2014, section 4.2). A
    genuine pair costs log(1 + exp(-z)), an impostor pair log(1 + exp(z)), and the loss is the mean over genuine pairs
    plus the mean over impostor pairs, each 0 where there is none: 2 log 2 for a head that knows nothing. |f(a)-f(b)|
    is no matrix product: photos are taken a few at a time, and again in the backward pass, so that memory stays far
    below B·B·d.

    Args:
      emb: [b, d] float embeddings of this device.
      identity: [b] int person ids.
      params: {"weights": [d], "bias": []} float, the same on all devices; `init_pair_logistic` makes them.
      axis_name: as for `triplet_loss`.

    Returns:
      (loss, metrics). Metrics: genuine, impostor: how many pairs {a, b}; loss_genuine, loss_impostor: the two means;
      accuracy: mean of the shares of genuine pairs with z > 0 and impostor pairs with z ≤ 0, over the kinds there are.

    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    _check(emb, identity, 0.0)
    found = {name: jnp.shape(value) for name, value in params.items()}
    expected = {"weights": (emb.shape[1],), "bias": ()}
    if found != expected:
        raise ValueError(
            f"params has {found}, but embeddings of {emb.shape[1]} numbers need {expected}; "
            f"make them with init_pair_logistic({emb.shape[1]})."
        )
    anchors, everyone, row, identities = gather(emb, identity, axis_name)
    weights, bias = params["weights"].astype(anchors.dtype), params["bias"].astype(anchors.dtype)

    @jax.checkpoint
    def column(other: Array) -> Array:
        return jnp.sum(jnp.abs(anchors - other) * weights, 1) + bias

    logits = lax.map(column, everyone, batch_size=max(1, CHUNK // anchors.size)).T
    means, pairs = _means_by_kind(
        _kinds(row, identities),
        (
            {"loss": jax.nn.softplus(-logits), "right": logits > 0},
            {"loss": jax.nn.softplus(logits), "right": ~(logits > 0)},
        ),
        axis_name,
    )
    loss = means[0]["loss"] + means[1]["loss"]
    kinds = (pairs[0] > 0).astype(loss.dtype) + (pairs[1] > 0).astype(loss.dtype)
    metrics = {
        "genuine": pairs[0],
        "impostor": pairs[1],
        "loss_genuine": means[0]["loss"],
        "loss_impostor": means[1]["loss"],
        "accuracy": (means[0]["right"] + means[1]["right"]) / jnp.maximum(kinds, 1),
    }
    return loss, lax.stop_gradient(metrics)


def init_pair_logistic(dim: int) -> dict[str, Array]:
    """{"weights": [dim], "bias": []} float32: every difference speaks against "same person", 0 logit at |a-b|₁ = 1."""
    return {"weights": jnp.full(dim, -1.0, jnp.float32), "bias": jnp.ones((), jnp.float32)}


# --- Listed triplets: sums, and their derivative


@jax.custom_vjp
def _listed(anchors, everyone, margins, triplets):
    """Per anchor, [b] each, over its listed triplets: Σ hinge, #hinge > 0, #triplets, mean d(A,P), mean d(A,N).

    The derivative is by hand because the number of rounds is known only when run. No collective may enter here: under
    shard_map a custom derivative around one is wrong by the number of devices.
    """

    def add(r, sums):
        chosen, d_ap, d_an, _, _ = _round(anchors, everyone, triplets, r)
        hinge = jnp.where(chosen, jnp.maximum(d_ap - d_an + margins, 0), 0)
        parts = (hinge, hinge > 0, chosen, jnp.where(chosen, d_ap, 0), jnp.where(chosen, d_an, 0))
        return tuple(s + part.astype(s.dtype) for s, part in zip(sums, parts, strict=True))

    zero = jnp.zeros_like(margins)
    count = zero.astype(jnp.int32)
    total, active, valid, d_ap, d_an = lax.fori_loop(0, triplets.rounds, add, (zero, count, count, zero, zero))
    return total, active, valid, d_ap / jnp.maximum(valid, 1), d_an / jnp.maximum(valid, 1)


def _round(anchors, everyone, triplets, r):
    positive, negative = triplets.positive[r], triplets.negative[r]
    chosen = positive >= 0
    to_positive = anchors - everyone[jnp.maximum(positive, 0)]
    to_negative = anchors - everyone[jnp.maximum(negative, 0)]
    return chosen, jnp.sum(to_positive**2, 1), jnp.sum(to_negative**2, 1), to_positive, to_negative


def _listed_forward(anchors, everyone, margins, triplets):
    return _listed(anchors, everyone, margins, triplets), (anchors, everyone, margins, triplets)


def _listed_backward(residual, cotangent):
    anchors, everyone, margins, triplets = residual

    def add(r, sums):
        by_anchors, by_everyone, by_margins = sums
        chosen, d_ap, d_an, to_positive, to_negative = _round(anchors, everyone, triplets, r)
        weight = jnp.where(chosen & ~(d_ap - d_an + margins <= 0), cotangent[0], 0)
        by_positive, by_negative = -2 * weight[:, None] * to_positive, 2 * weight[:, None] * to_negative
        # One scatter for both: XLA's is a serial loop on a CPU.
        index = jnp.maximum(jnp.concatenate([triplets.positive[r], triplets.negative[r]]), 0)
        by_everyone = by_everyone.at[index].add(jnp.concatenate([by_positive, by_negative]))
        return by_anchors - by_positive - by_negative, by_everyone, by_margins + weight

    zeros = (jnp.zeros_like(anchors), jnp.zeros_like(everyone), jnp.zeros_like(margins))
    return *lax.fori_loop(0, triplets.rounds, add, zeros), None


_listed.defvjp(_listed_forward, _listed_backward)


def _mean_distances(layout: mining.Layout, distance: Array) -> tuple[Array, Array]:
    """Per anchor, [b] each: mean d(A,P) and mean d(A,N) over all its positives and negatives."""
    d_ap = jnp.sum(jnp.where(layout.is_positive(), distance, 0), 1) / jnp.maximum(layout.positives, 1)
    d_an = jnp.sum(jnp.where(layout.is_different(), distance, 0), 1) / jnp.maximum(layout.negatives, 1)
    return d_ap, d_an


# --- The global batch


def check_batch(emb: Array, identity: Array) -> None:
    """Raises ValueError unless emb is float [b, d] with one integer id a row, b and d at least 1."""
    if emb.ndim != 2 or 0 in emb.shape or not jnp.issubdtype(emb.dtype, jnp.floating):
        raise ValueError(f"emb is {emb.dtype}{list(emb.shape)}; pass float embeddings [b, d] of at least one photo.")
    if identity.shape != emb.shape[:1] or not jnp.issubdtype(identity.dtype, jnp.integer):
        raise ValueError(
            f"identity is {identity.dtype}{list(identity.shape)} beside emb {list(emb.shape)}; "
            f"pass one integer person id a row: [{emb.shape[0]}]."
        )


def _check(emb: Array, identity: Array, margin: float | Array) -> None:
    check_batch(emb, identity)
    if isinstance(margin, int | float) and not margin >= 0:
        raise ValueError(f"margin is {margin}; a negative margin rewards a mistake. Pass a margin ≥ 0, such as 0.2.")


def gather(emb: Array, identity: Array, axis_name: AxisName) -> Gathered:
    """The embeddings [b, d] and ids [b] of this device, and those of all devices of an axis; see `triplet_loss`."""
    emb, identity = jnp.asarray(emb), jnp.asarray(identity)
    emb = emb.astype(jnp.promote_types(emb.dtype, jnp.float32))
    row = jnp.arange(emb.shape[0], dtype=jnp.int32)
    if axis_name is None:
        return Gathered(emb, emb, row, identity)
    row += lax.axis_index(axis_name) * emb.shape[0]
    return Gathered(
        emb,
        lax.all_gather(emb, axis_name, tiled=True),
        row,
        lax.all_gather(identity, axis_name, tiled=True),
    )


def _psum(x: Any, axis_name: AxisName) -> Any:
    return x if axis_name is None else lax.psum(x, axis_name)


def _kinds(row: Array, identities: Array) -> tuple[Array, Array]:
    """[b, B] bool each: genuine pairs, a photo with itself left out, and impostor pairs."""
    same = identities[row][:, None] == identities[None, :]
    itself = row[:, None] == jnp.arange(identities.shape[0], dtype=jnp.int32)[None, :]
    return same & ~itself, ~same


def _means_by_kind(masks, values, axis_name):
    """For each kind of pair, the global mean of each value over its pairs, 0 without any; and how many pairs {a, b}."""
    dtype = values[0]["loss"].dtype
    sums = [
        (
            {name: jnp.sum(jnp.where(mask, value.astype(dtype), 0)) for name, value in named.items()},
            jnp.sum(jnp.sum(mask, 1, dtype=jnp.int32).astype(dtype)),
        )
        for mask, named in zip(masks, values, strict=True)
    ]
    sums = _psum(sums, axis_name)
    means = [{name: total / jnp.maximum(count, 1) for name, total in named.items()} for named, count in sums]
    # Each pair {a, b} was met twice, as (a, b) and as (b, a).
    return means, [count / 2 for _, count in sums]


def _spread(values: dict[str, Array], has: Array, layout: mining.Layout, axis_name: AxisName) -> dict[str, Array]:
    """Mean and quantiles of each [b] value over the anchors of all devices that have one; 0 where there is none."""
    value = jnp.stack(list(values.values()))
    if axis_name is not None:
        # A sum over slots that are 0 elsewhere gathers exactly, and shard_map knows its result to be equal everywhere.
        slots = jnp.zeros((len(value) + 1, len(layout.batch.order)), value.dtype)
        mine = jnp.concatenate([value, has[None].astype(value.dtype)])
        gathered = lax.psum(slots.at[:, layout.row].set(mine), axis_name)
        value, has = gathered[:-1], gathered[-1] > 0
    count = jnp.sum(has, dtype=jnp.int32)
    last = jnp.maximum(count - 1, 0)
    place = jnp.asarray(list(QUANTILES.values()), value.dtype) * last
    below = jnp.floor(place).astype(jnp.int32)
    ranked = jnp.sort(jnp.where(has, value, jnp.inf), axis=1)
    low, high = ranked[:, below], ranked[:, jnp.minimum(below + 1, last)]
    quantile = jnp.where(count > 0, low + (high - low) * (place - below), 0)
    mean = jnp.sum(jnp.where(has, value, 0), 1) / jnp.maximum(count, 1)
    out = {}
    for i, name in enumerate(values):
        out[f"{name}_mean"] = mean[i]
        out |= {f"{name}_{label}": quantile[i, j] for j, label in enumerate(QUANTILES)}
    return out

"""One update: (state, batch) → (state, metrics), compiled once, on one device or many."""

import contextlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from faceembed import losses
from faceembed import mesh as meshes
from faceembed.encoders import layers
from faceembed.training import chunks, diagnostics, transfer

LossFn = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
"""(emb [b, d], identity [b], params, memory, key, step [], axis_name) → (scalar loss over all devices, scalar metrics)."""


@flax.struct.dataclass
class TrainState:
    """Everything an update reads and writes. Random numbers follow from (seed, step), so the step is all they need."""

    step: jax.Array
    """int32 [], updates made, those not applied included."""
    skipped: jax.Array
    """int32 [], updates that were not applied because the loss or a gradient was not finite."""
    params: Any
    """{"encoder": …, "loss": …}: a loss may have parameters of its own; {} for most."""
    batch_stats: Any
    opt_state: Any
    ema: Any
    """{"params": …, "batch_stats": …}: moving averages, which evaluation uses."""
    memory: losses.Memory | None = None
    """Embeddings of recent batches, for a loss that compares with them; None for others."""


def decays(path: tuple[Any, ...], leaf: jax.Array) -> bool:
    """Whether weight decay applies to a parameter: to kernels; never to norms, biases or PReLU slopes."""
    return leaf.ndim > 1 and getattr(path[-1], "key", None) in ("kernel", meshes.CLASS_KERNEL)


def make_optimizer(
    update: optax.GradientTransformation, *, learning_rate: float, warmup: int, steps: int, weight_decay: float,
    clip_norm: float, by_layer: optax.GradientTransformation | None = None,
) -> tuple[optax.GradientTransformation, optax.Schedule]:  # fmt: skip
    """Clipping → an update rule → decoupled weight decay → warm-up and cosine.

    Args:
      update: turns gradients into a direction, for example `optax.scale_by_adam()`.
      learning_rate: peak, reached after `warmup` steps; a cosine takes it to 1 % of that at `steps`.
      weight_decay: decoupled (Loshchilov & Hutter 2019), multiplied by the learning rate; see `decays`.
      clip_norm: largest global L2 norm of a gradient.
      by_layer: comes last, such as `transfer.scale_by_layer`; None for one rate.

    Returns:
      (transformation, schedule): the schedule maps a step to its learning rate.
    """
    warmup = min(warmup, steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=learning_rate / (warmup + 1), peak_value=learning_rate, warmup_steps=warmup, decay_steps=steps,
        end_value=learning_rate / 100,
    )  # fmt: skip
    mask = lambda params: jax.tree_util.tree_map_with_path(decays, params)  # noqa: E731
    chain = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        update,
        optax.add_decayed_weights(weight_decay, mask=mask),
        optax.scale_by_learning_rate(schedule),
        *([] if by_layer is None else [by_layer]),
    )
    return chain, schedule


def init_state(
    encoder: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    size: int,
    loss_params: Any,
    dtype: Any,
    memory: losses.Memory | None = None,
) -> TrainState:
    """A fresh state.

    Args:
      encoder: takes [b, size, size, 3].
      seed: of the parameters.
      size: side of the encoder's input, in pixels.
      loss_params: parameters of the loss; {} for none.
      dtype: of all parameters, float32, or float64 for comparisons.
      memory: from `losses.init_memory`, for a loss that has one.
    """
    # Parameters are drawn in float32 whatever the dtype, so that a float64 run starts from the same numbers.
    # Under jit the forward pass that `init` makes is dead code; without, every layer of it would be compiled by itself.
    # It runs once: compiled without optimisation it is ready in a third of the time.
    init = jax.jit(
        lambda key: encoder.init(key, jnp.zeros((2, size, size, 3), jnp.float32), train=False),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    variables = init(jax.random.key(seed))
    cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)  # noqa: E731
    params = cast({"encoder": variables["params"], "loss": loss_params})
    batch_stats = cast(variables.get("batch_stats", {}))
    # The average starts at the parameters but in buffers of its own: a donated buffer may appear only once.
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, {"params": params["encoder"], "batch_stats": batch_stats}),
        memory=memory,
    )


def make_train_step(
    encoder: nn.Module,
    loss: LossFn,
    optimizer: optax.GradientTransformation,
    views: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    *,
    seed: int,
    ema: float,
    mesh: Mesh,
    shardings: TrainState,
    frozen: transfer.Frozen | None = None,
    microbatches: int = 1,
    accumulate: int = 1,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles an update.

    The batch is divided over the mesh's data axis: the encoder runs under plain jit (so batch normalisation is global),
    the loss inside shard_map, where it gathers the embeddings of all devices. Differentiation is outside shard_map; no
    number is multiplied or divided by a device count.

    Args:
      encoder: a Flax module; `apply(variables, images, train=True)` → [b, d].
      loss: see `LossFn`; called with this device's embeddings and `axis_name`.
      optimizer: see `make_optimizer`.
      views: (step, slot [b], uint8 images [b, s, s, 3]) → normalised float images; see `data.augment`.
      seed: of every random number.
      ema: decay of the moving averages, reached as (1 + step) / (10 + step) grows past it; 0 copies.
      mesh: from `mesh.make_mesh`.
      shardings: of every leaf of the state, from `mesh.state_sharding`. They alone decide whether optimizer and averages
        are kept whole on every device or divided over them (ZeRO stage 1, Rajbhandari et al. 2020).
      frozen: which of the encoder's layers stay as they are; the optimizer leaves them alone, too.
      microbatches: encode in so many chunks, one at a time, for the loss of the whole batch; see `chunks.cached`. Each
        chunk is normalised by its own moments; the statistics are updated once, by those of all. The encoder's batch
        norms must then be `layers.BatchNorm`.
      accumulate: the mean of the losses of so many chunks; see `chunks.accumulated`. One of both is 1.

    Returns:
      (state, batch) → (state, metrics). The state is donated: its buffers are gone after the call. `batch` holds
      "image" uint8 [b, s, s, 3], "identity" int32 [b] and "slot" int32 [b]. Metrics are those of the loss, "loss",
      "skipped" and what `diagnostics.measure` adds. An update whose loss, gradient or batch statistics are not finite is
      not applied; it is counted in `state.skipped`.
    """
    parts, in_chunks = max(microbatches, accumulate), chunks.accumulated if accumulate > 1 else chunks.cached
    data = PartitionSpec(meshes.DATA)
    # Parameters of a loss that are divided over the devices arrive in it divided.
    of_loss = jax.tree.map(lambda sharding: sharding.spec, shardings.params["loss"])

    def update(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), state.step)
        dropout_key, loss_key = jax.random.split(key)

        same = PartitionSpec()

        @jax.shard_map(mesh=mesh, in_specs=(data, data, of_loss, same, same, same), out_specs=same)
        def global_loss(emb: jax.Array, identity: jax.Array, params: Any, memory: Any, key: jax.Array, step: jax.Array):
            return loss(emb, identity, params, memory, key, step, meshes.DATA)

        def remembered(memory: losses.Memory, emb: jax.Array, identity: jax.Array) -> losses.Memory:
            # Made whole first: left to itself the compiler divides the memory and passes its parts round.
            whole = jax.lax.with_sharding_constraint((emb, identity), NamedSharding(mesh, same))
            return losses.remember(memory, *whole)

        def encode(params: Any, photos: dict[str, jax.Array], collection: str = layers.MOMENTS):
            images = views(state.step, photos["slot"], photos["image"])
            held = transfer.without_gradient(params, frozen) if frozen else params
            with (
                transfer.evaluate_frozen(frozen) if frozen else contextlib.nullcontext(),
                layers.dropout_by_slot(photos["slot"]),
            ):
                emb, updates = encoder.apply(
                    {"params": held, "batch_stats": state.batch_stats}, images, train=True, mutable=[collection],
                    rngs={"dropout": dropout_key},
                )  # fmt: skip
            return emb, updates.get(collection, {})

        def cost(emb: jax.Array, photos: dict[str, jax.Array], params: Any):
            return global_loss(emb, photos["identity"], params, state.memory, loss_key, state.step)

        def objective(params: Any):
            emb, statistics = encode(params["encoder"], batch, "batch_stats")
            value, metrics = cost(emb, batch, params["loss"])
            return value, (statistics, emb, metrics)

        if parts == 1:
            (value, (batch_stats, emb, metrics)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        else:
            value, metrics, emb, moments, grads = in_chunks(
                encode, cost, state.params, batch, chunks=parts, mesh=mesh, shardings=shardings.params
            )
            batch_stats = layers.after_chunks(state.batch_stats, moments)
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        health = diagnostics.measure(emb, value, metrics, grads, batch_stats, changes)
        finite = health["finite"]

        params = optax.apply_updates(state.params, changes)
        decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step)).astype(value.dtype)
        average = jax.tree.map(
            lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype),
            state.ema,
            {"params": params["encoder"], "batch_stats": batch_stats},
        )
        if frozen:  # of two equal numbers, the sum of both shares need not be that number again
            latest = {"params": params["encoder"], "batch_stats": batch_stats}
            average = jax.tree.map(lambda old, new, mean: jnp.where(new == old, old, mean), state.ema, latest, average)
        new = TrainState(
            step=state.step + 1,
            skipped=state.skipped + jnp.where(finite, 0, 1),
            params=_choose(finite, params, state.params),
            batch_stats=_choose(finite, batch_stats, state.batch_stats),
            # The schedule's count lives in here: an update that is not applied does not advance it.
            opt_state=_choose(finite, opt_state, state.opt_state),
            ema=_choose(finite, average, state.ema),
            memory=state.memory and _choose(finite, remembered(state.memory, emb, batch["identity"]), state.memory),
        )
        return new, {**metrics, "loss": value, "skipped": new.skipped, **health}

    batch_sharding = meshes.batch_sharding(mesh)
    return jax.jit(update, donate_argnums=0, in_shardings=(shardings, batch_sharding), out_shardings=(shardings, None))


def _choose(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)

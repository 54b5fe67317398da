"""How triplet training fails, seen while it happens.

The device measures: `measure` adds a few scalars to an update's metrics, from arrays that the update has anyway. The
host reads them at the next log: `Watch.read` turns rows of such scalars into events with the step, the cause and what
to try. Three failures are told apart:

- *collapse*: all photos get one embedding, or one line. The loss stands still at the margin and the effective rank
  goes to 1; the gradient is small and points nowhere.
- *starvation*: no triplet is active, so the loss and its gradient are 0 and nothing is learned.
- *non-finite*: the loss, a gradient or a batch statistic is infinite or NaN. The update is not applied (see
  `training.step`); what is reported is which of them, and in which layers.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

COLLAPSED_RANK = 1.25
"""Effective rank below which an update counts as collapsed: a mean squared distance of some 0.2 between photos."""

PERSISTS = 0.5
"""An event is reported when at least this share of the updates since the last log shows it: one odd batch is none."""

FLAGS = ("collapsed", "starved", "finite", "statistics_finite")
"""Metrics that are yes or no, for `Watch` and not for the log."""


def effective_rank(emb: Array) -> Array:
    """How many directions the embeddings fill: (Σλ)² / Σλ² over the eigenvalues λ of E[x xᵀ] (participation ratio).

    Not centred: at one point for all photos, and on one line through the origin, it is 1; spread evenly over the
    sphere it is d. It takes one [d, d] product and no eigenvalues: Σλ is the trace, Σλ² the squared Frobenius norm.

    Args:
      emb: [b, d] float, sharded or not.

    Returns:
      [] float32 at least, 1 to min(b, d); NaN if every embedding is 0.
    """
    emb = emb.astype(jnp.promote_types(emb.dtype, jnp.float32))
    moment = jnp.matmul(emb.T, emb, precision=lax.Precision.HIGHEST)
    return jnp.trace(moment) ** 2 / jnp.sum(moment**2)


def group_norms(grads: Mapping[str, Any]) -> dict[str, Array]:
    """L2 norm of the gradient of each group of layers, {"grad_norm/GROUP": []}.

    A group is what stands before the first underscore in the names of the encoder's submodules: stem, stage1, …,
    embedding. A loss with parameters of its own is the group "loss".
    """
    groups: dict[str, list[Any]] = {}
    for name, part in grads["encoder"].items():
        groups.setdefault(name.split("_")[0], []).append(part)
    if jax.tree.leaves(grads["loss"]):
        groups["loss"] = [grads["loss"]]
    return {f"grad_norm/{name}": optax.tree.norm(parts) for name, parts in groups.items()}


def active_by_miner(mine: Callable[..., tuple[Array, dict[str, Array]]], batch: Any) -> dict[str, Array]:
    """The share of active triplets that each kind of mining would find in this batch, {"active_MINER": []}.

    Where `semi_hard` finds none, `active_hardest` says whether a harder miner still would; `active_all` is the share
    of all triplets.

    Args:
      mine: (batch, miner=NAME) → (loss, metrics), such as `losses.gathered_triplet_loss` with its options.
      batch: what it takes.
    """
    return {f"active_{miner}": mine(batch, miner=miner)[1]["active"] for miner in ("hardest", "semi_hard", "all")}


def measure(
    emb: Array, loss: Array, metrics: Mapping[str, Array], grads: Mapping[str, Any], batch_stats: Any, changes: Any
) -> dict[str, Array]:
    """What is known of an update's health, computed on the device.

    Args:
      emb: [b, d] embeddings of the global batch.
      loss: [].
      metrics: of the loss; "triplets" and "active" where it has triplets.
      grads: {"encoder": …, "loss": …}.
      batch_stats: the new batch statistics.
      changes: what the optimizer would add to the parameters.

    Returns:
      Scalars: effective_rank, grad_norm, grad_norm/GROUP, and the flags, bool: collapsed, starved, statistics_finite,
      and finite, which is False if anything at all is not and the update must not be applied.
    """
    rank, norm = effective_rank(emb), optax.tree.norm(grads)
    # The statistics too: one infinite pixel leaves the loss finite on some paths and poisons the averages for ever.
    statistics = jax.tree.reduce(
        jnp.logical_and, jax.tree.map(lambda x: jnp.isfinite(x).all(), batch_stats), jnp.array(True)
    )
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(changes)) & statistics
    starved = jnp.array(False)
    if "active" in metrics:
        starved = finite & ~(metrics["active"] > 0)
    return {
        "effective_rank": rank,
        "grad_norm": norm,
        **group_norms(grads),
        "collapsed": finite & (rank < COLLAPSED_RANK),
        "starved": starved,
        "statistics_finite": statistics,
        "finite": finite,
    }


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each metric over the updates of a row of the log, of those where it is finite; NaN where it never is.

    The flags are left out: `Watch` reads them.
    """
    columns = {name: np.array([row[name] for row in rows], float) for name in rows[0] if name not in FLAGS}
    return {name: float(x[np.isfinite(x)].mean()) if np.isfinite(x).any() else math.nan for name, x in columns.items()}


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that a person should know of a training."""

    step: int
    """The first update that showed it."""
    kind: str
    """"collapse" | "starvation" | "non-finite", or one of these with " over" behind it."""
    message: str


class Watch:
    """Turns rows of metrics into events: once when something begins, once when it is over.

    Args:
      dim: numbers in an embedding.
      margin: of a triplet loss; None for other losses.
      miner: of a triplet loss, as it is named in the config.
      ongoing: kinds that an earlier command reported and that were not over, when training goes on.
    """

    def __init__(
        self, *, dim: int, margin: float | None = None, miner: str | None = None, ongoing: Sequence[str] = ()
    ) -> None:
        self._dim, self._margin, self._miner = dim, margin, miner
        self._ongoing = set(ongoing)

    def read(self, first: int, rows: Sequence[Mapping[str, float]], learning_rate: float) -> list[Event]:
        """Events of the updates since the last log.

        Args:
          first: the first of these updates.
          rows: their metrics, one mapping an update.
          learning_rate: of the last of them.

        Returns:
          Events in the order of `FLAGS`: none for what goes on as it was.
        """
        shown = {
            "collapse": [bool(row["collapsed"]) for row in rows],
            "starvation": [bool(row["starved"]) for row in rows],
            "non-finite": [not row["finite"] for row in rows],
        }
        events = []
        for kind, steps in shown.items():
            # One update that was not finite is news; one odd batch without an active triplet is not.
            present = any(steps) if kind == "non-finite" else sum(steps) >= PERSISTS * len(rows)
            if present and kind not in self._ongoing:
                at = steps.index(True)
                self._ongoing.add(kind)
                events.append(Event(first + at, kind, self._explain(kind, rows, at, sum(steps), learning_rate)))
            elif kind in self._ongoing and not any(steps):
                self._ongoing.discard(kind)
                events.append(Event(first, f"{kind} over", _OVER[kind]))
        return events

    def _explain(
        self, kind: str, rows: Sequence[Mapping[str, float]], at: int, count: int, learning_rate: float
    ) -> str:
        row = rows[at]
        if kind == "collapse":
            margin = f", and the margin is {self._margin:g}" if self._margin is not None else ""
            easier = (
                "mine easier negatives at first (--loss.miner semi_hard, with --loss.last-miner hardest for the end), "
                if self._miner in ("hardest", "all")
                else ""
            )
            return (
                "collapse: all photos get nearly one embedding. "
                f"Effective rank {row['effective_rank']:.2f} of {self._dim}, loss {row['loss']:.4f}{margin}. "
                "Steps too long or negatives too hard at the start do this; what is learned from here on is rarely worth "
                f"keeping. Start afresh in another --run-dir: {easier}a lower --schedule.learning-rate (it was "
                f"{learning_rate:.2g}), a longer --schedule.warmup."
            )
        if kind == "starvation":
            if row.get("triplets") == 0:
                return (
                    "starvation: no valid triplet in the batch, since nobody in it has two photos or there is one person "
                    "only. Look at `launch.py data info SOURCE`; try --batch.photos 4 and a lower --batch.singletons."
                )
            harder = max(
                (value for r in rows if math.isfinite(value := r.get("active_hardest", math.nan))), default=None
            )
            try_ = (
                f"--loss.miner hardest, which would still find {harder:.0%} of its triplets active"
                if harder and self._miner != "hardest"
                else f"a larger --loss.margin (it is {self._margin:g}), more --batch.people, stronger augmentation"
            )
            return (
                f"starvation: no triplet of {count} of {len(rows)} batches violates the margin, so these updates taught "
                f"nothing. Either the training is done, or its triplets are too easy: try {try_}."
            )
        parts = [
            *(["the loss"] if not math.isfinite(row["loss"]) else []),
            *(["batch statistics"] if not row["statistics_finite"] else []),
        ]
        groups = [
            name.removeprefix("grad_norm/")
            for name, value in row.items()
            if name.startswith("grad_norm/") and not math.isfinite(value)
        ]
        if groups:
            parts.append(f"the gradient of {', '.join(groups)}")
        return (
            f"not finite: {' and '.join(parts) or 'the optimizer’s step'}, in {count} of {len(rows)} updates since the "
            "last log. They were not applied: parameters, averages and optimizer are as before. If it comes again, try a "
            f"lower --schedule.learning-rate (it was {learning_rate:.2g}), a lower --schedule.clip-norm, and --precision "
            "float32 where it is bfloat16."
        )


_OVER = {
    "collapse": "collapse is over: the embeddings spread again.",
    "starvation": "starvation is over: some triplets are active again.",
    "non-finite": "all updates since the last log were finite again.",
}

"""Starting from another network's layers: which are taken over, which stay as they are, how fast the others learn."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from faceembed.encoders.layers import BatchNorm

Frozen = Callable[[str], bool]
"""Whether a layer or parameter of the encoder, "block1/conv1/kernel", stays as it is."""


def names_of(params: Any) -> list[str]:
    """ "block1/conv1/kernel" for every parameter."""
    return ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def fits(name: str, pattern: str) -> bool:
    """Whether a pattern (of `fnmatch`) names a parameter or a layer around it: "block1" fits "block1/conv1/kernel"."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}/*")


def frozen_by(patterns: Sequence[str], params: Any) -> Frozen:
    """Which parameters patterns freeze.

    Raises:
      ValueError: a pattern that fits nothing, or nothing left to train.
    """
    _require_fitting(patterns, params, "--freeze")
    frozen = lambda name: any(fits(name, pattern) for pattern in patterns)  # noqa: E731
    if patterns and all(frozen(name) for name in names_of(params)):
        raise ValueError(f"--freeze {' '.join(patterns)} freezes every parameter: nothing would be trained.")
    return frozen


def rates_by(rules: Sequence[str], params: Any) -> Callable[[str], float]:
    """PATTERN=FACTOR rules → the factor of a parameter's learning rate: that of the last rule which fits, else 1.

    Raises:
      ValueError: a rule of another form, a factor that is not finite and positive, or a pattern that fits nothing.
    """
    factors: list[tuple[str, float]] = []
    for rule in rules:
        pattern, _, text = rule.rpartition("=")
        try:
            factor = float(text)
        except ValueError:
            factor = -1.0
        if not pattern or not 0 < factor < float("inf"):
            raise ValueError(
                f"--layer-rates has {rule!r}: expected PATTERN=FACTOR with a factor above 0, such as 'block*=0.1'. "
                "Layers that are not to change at all: --freeze."
            )
        factors.append((pattern, factor))
    _require_fitting([pattern for pattern, _ in factors], params, "--layer-rates")
    return lambda name: next((factor for pattern, factor in reversed(factors) if fits(name, pattern)), 1.0)


def _require_fitting(patterns: Sequence[str], params: Any, flag: str) -> None:
    names = names_of(params)
    for pattern in patterns:
        if not any(fits(name, pattern) for name in names):
            raise ValueError(f"{flag} has the pattern {pattern!r}, which fits no layer; there are {', '.join(params)}.")


def scale_by_layer(rates: Callable[[str], float], frozen: Frozen) -> optax.GradientTransformation:
    """The last part of an optimizer: updates times the rate of their layer, and none at all for frozen ones.

    The tree is that of the trainer, {"encoder": …, "loss": …}; parameters of the loss keep their rate.
    """

    def scaled(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        part, *inner = (key.key for key in path)
        name = "/".join(inner)
        if part != "encoder":
            return update
        # Not "times 0": that would keep a weight decay's sign and a NaN.
        return jax.numpy.zeros_like(update) if frozen(name) else update * rates(name)

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scaled, updates))


def without_gradient(params: Any, frozen: Frozen) -> Any:
    """Parameters of an encoder, of which the frozen ones are constants: no gradient is computed for them."""

    def held(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(leaf) if frozen("/".join(key.key for key in path)) else leaf

    return jax.tree_util.tree_map_with_path(held, params)


def evaluate_frozen(frozen: Frozen) -> Any:
    """A context in which frozen batch normalisations use their running statistics, and change none, in training too."""

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if (
            isinstance(module, BatchNorm)
            and context.method_name == "__call__"
            and _holds(frozen, "/".join(module.path), module.use_scale)
        ):
            object.__setattr__(module, "use_running_average", True)  # this application's own copy of the module
        return call(*args, **kwargs)

    return nn.intercept_methods(interceptor)


def _holds(frozen: Frozen, norm: str, scaled: bool) -> bool:
    """A norm that is named, or all of whose parameters are: "stem_bn", "stem_bn/*" or "*/scale" and "*/bias"."""
    return frozen(norm) or (frozen(f"{norm}/bias") and (not scaled or frozen(f"{norm}/scale")))


def norms_by_batch(variables: Mapping[str, Any], frozen: Frozen | None) -> list[str]:
    """Batch normalisations that training normalises by the moments of a batch: all but those that are frozen."""
    names = names_of(variables["params"])
    norms = {name.rpartition("/")[0] for name in names_of(variables.get("batch_stats", {}))}
    return sorted(norm for norm in norms if not (frozen and _holds(frozen, norm, f"{norm}/scale" in names)))


def require_alike(fresh: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuses a network of other layers; shapes may differ. Both are {"params", "batch_stats"}.

    Raises:
      ValueError: the first few layers that only one of both has are named; or no shape agrees.
    """
    alike = False
    for part in ("params", "batch_stats"):
        here, there = fresh.get(part, {}), found.get(part, {})
        odd = sorted(set(names_of(here)) ^ set(names_of(there)))
        if odd:
            raise ValueError(
                f"--init holds another kind of encoder: {len(odd)} parameters are in one of both only, such as "
                f"{', '.join(odd[:3])}. Give the --encoder and its options that it was trained with."
            )
        shapes = zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True)
        alike |= any(one.shape == other.shape for one, other in shapes)
    if not alike:
        raise ValueError("--init has no layer of the shape that this encoder has: nothing would be taken over.")


def taken_over(fresh: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Variables that start from another network's wherever the shapes agree.

    Args:
      fresh: {"params", "batch_stats"} as `init` drew them.
      found: {"params", "batch_stats"} of the other network, of the same family.

    Returns:
      (variables, what stayed fresh: "embedding/kernel [256, 64], there [256, 128]").

    Raises:
      ValueError: the trees have different layers (the first few are named), or no shape agrees.
    """
    require_alike(fresh, found)
    result, stayed = {}, []
    for part in ("params", "batch_stats"):
        here, there = fresh[part], found.get(part, {})
        values = dict(zip(names_of(there), jax.tree.leaves(there), strict=True))

        def take(path: tuple[Any, ...], leaf: jax.Array, values: dict[str, Any] = values) -> Any:
            name = "/".join(key.key for key in path)
            value = values[name]
            if value.shape != leaf.shape:
                stayed.append(f"{name} {list(leaf.shape)}, there {list(value.shape)}")
                return leaf
            return np.asarray(value).astype(leaf.dtype)

        result[part] = jax.tree_util.tree_map_with_path(take, here)
    return result, stayed

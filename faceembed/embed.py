"""From a checkpoint and photos to embeddings."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from faceembed import checkpoint, config, encoders
from faceembed.data import crops, sources
from faceembed.encoders import dlib_resnet
from faceembed.preprocess import PUBLISHED, Preprocess, Square, crop_square, framed_square, normalize
from faceembed.verification import heads

EmbedFn = Callable[[Any, Any], jax.Array]
"""(variables, uint8 images [b, s, s, 3]) → [b, d]."""


def build_encoder(experiment: config.Experiment) -> nn.Module:
    """The encoder an experiment names, in its precision."""
    options = {field.name: getattr(experiment.encoder, field.name) for field in dataclasses.fields(experiment.encoder)}
    if isinstance(experiment.encoder, config.IResNet):
        options.pop("depth")  # it is part of the name
    return encoders.make_encoder(config.encoder_name(experiment.encoder), dtype=experiment.precision, **options)


def make_embed(encoder: nn.Module, pre: Preprocess) -> EmbedFn:
    """Compiles an encoder with its preprocessing and flip fusion: one compilation a batch size.

    "sum" adds the embeddings of a photo and its mirror image, "concat" joins them; both have unit length.
    """

    def encode(variables: Any, x: jax.Array) -> Any:
        return encoder.apply(variables, x, train=False)

    @jax.jit
    def embed(variables: Any, images: jax.Array) -> jax.Array:
        x = normalize(pre, images)
        if pre.flip == "none":
            return encode(variables, x)
        both = encode(variables, jnp.concatenate([x, x[:, :, ::-1]]))
        straight, mirrored = jnp.split(both, 2)
        fused = straight + mirrored if pre.flip == "sum" else jnp.concatenate([straight, mirrored], axis=1)
        return fused * jax.lax.rsqrt(jnp.sum(fused**2, axis=1, keepdims=True) + 1e-12)

    return embed


def make_layers(
    encoder: nn.Module, pre: Preprocess, names: tuple[str, ...]
) -> Callable[[Any, Any], dict[str, jax.Array]]:
    """Compiles the reading of inner layers: (variables, uint8 images) → name → [b, k] float32 >= 0.

    A layer is "features" (what the encoder's method of that name gives) or one of its modules, such as "stage3_block1":
    ReLU of its output, averaged over places. With flip fusion, the mean over a photo and its mirror image.
    """
    inner = tuple(name for name in names if name != "features")

    def captured(module: nn.Module, method: str) -> bool:
        return method == "__call__" and module.name in inner

    @jax.jit
    def read(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        x = normalize(pre, images)
        if pre.flip != "none":
            x = jnp.concatenate([x, x[:, :, ::-1]])
        features, state = encoder.apply(
            variables, x, train=False, method="features", capture_intermediates=captured, mutable=["intermediates"]
        )
        found = {"features": features} if "features" in names else {}
        for name in inner:
            value = state["intermediates"][name]["__call__"][0].astype(jnp.float32)
            found[name] = jnp.mean(jax.nn.relu(value), axis=tuple(range(1, value.ndim - 1)))
        if pre.flip != "none":
            found = {name: value.reshape(2, -1, value.shape[-1]).mean(axis=0) for name, value in found.items()}
        return found

    return read


def embed_all(embed: Callable[[Any, Any], Any], variables: Any, images: np.ndarray, batch: int = 256) -> Any:
    """Embeds any number of photos in batches of one size, the last one padded, so that nothing is compiled twice.

    Args:
      images: uint8 [n, s, s, 3].
      batch: photos at once; fewer photos take the next power of two.

    Returns:
      [n, d] float32 (float64 for a float64 checkpoint); for `make_layers`'s function a dict of such arrays.
    """
    if not len(images):
        raise ValueError("there are no images to embed.")
    batch = min(batch, 1 << (len(images) - 1).bit_length())
    results = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        padded = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), part.dtype)])
        results.append((embed(variables, padded), len(part)))
    parts = [jax.tree.map(lambda emb, count=count: np.asarray(emb)[:count], found) for found, count in results]
    return jax.tree.map(lambda *emb: np.concatenate(emb), *parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedder:
    """A checkpoint ready to use: `embedder(images) → [n, d]`, unit vectors (dlib's own network alone gives others)."""

    variables: Any
    """{"params", "batch_stats"}, the moving averages of the training."""
    preprocess: Preprocess
    config: config.Experiment
    data: dict[str, Any]
    """What the checkpoint was trained on."""
    policy: dict[str, Any] | None
    """Verification heads and thresholds set on calibrate people; None when the run ended without them."""
    path: Path
    """The step directory; the name of a pretrained one."""
    embed: EmbedFn

    @property
    def size(self) -> int:
        """Side of the crops that `__call__` takes, in pixels."""
        return self.preprocess.size

    @property
    def dim(self) -> int:
        """d, the length of an embedding."""
        image = jax.ShapeDtypeStruct((1, self.size, self.size, 3), np.uint8)
        return int(jax.eval_shape(self.embed, self.variables, image).shape[1])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the variables: embeddings of two checkpoints are comparable only if it is one."""
        return checkpoint.fingerprint(self.variables)

    def head(self, name: str = "logistic_distance") -> heads.Head:
        """A verification head fitted on calibrate people: `head.score(a, b) >= head.threshold` means same person.

        Raises:
          ValueError: if the checkpoint has no policy, or no such head in it.
        """
        if self.policy is None and self.data.get("step") == 0:
            raise ValueError(
                f"{self.path} holds imported weights, which bring no thresholds: fit a head on pairs of yours, "
                "fe.verify.fit('logistic_distance', a, b, same), or see python launch.py verify --help."
            )
        if self.policy is None:
            raise ValueError(
                f"{self.path} has no policy.json for its parameters: the run did not end, or this is not its best step. "
                "Let the run end, or fit a head: fe.verify.fit('logistic_distance', a, b, same)."
            )
        if name not in self.policy["heads"]:
            raise ValueError(f"the policy has no head {name!r}; it has {', '.join(self.policy['heads'])}.")
        return heads.Head.from_dict(self.policy["heads"][name])

    def threshold(self, fmr: float, head: str = "logistic_distance") -> float:
        """The threshold that was set for a false match rate on all pairs of calibrate people's photos.

        Raises:
          ValueError: if the checkpoint has no policy or no such head, or its people could not resolve that rate.
        """
        self.head(head)
        assert self.policy is not None
        points = {point["fmr"]: point["threshold"] for point in self.policy["operating_points"][head]}
        if fmr not in points:
            known = ", ".join(f"{rate:g}" for rate in points) or "none"
            raise ValueError(
                f"the policy of {self.path} has no threshold of {head} for an FMR of {fmr:g}; it has them for {known}. "
                "A rate needs 10 false matches among calibrate people: train with more people for a smaller one."
            )
        return float(points[fmr])

    def same(self, a: np.ndarray, b: np.ndarray, *, fmr: float, head: str = "logistic_distance") -> np.ndarray:
        """Do both sides show one person, at a false match rate?

        Args:
          a, b: embeddings [n, d] or [d], or crops uint8 [n, size, size, 3] or [size, size, 3].
          fmr: one that the policy has a threshold for, such as 1e-3.
          head: a head of the policy.

        Returns:
          [n] bool; one bool for one pair.

        Raises:
          ValueError: as `threshold`, or the two sides do not fit each other or the checkpoint.
        """
        sides = [np.asarray(side) for side in (a, b)]
        one = all(side.ndim == (3 if side.dtype == np.uint8 else 1) for side in sides)
        if one:
            sides = [side[None] for side in sides]
        emb = [self(side) if side.dtype == np.uint8 else side for side in sides]
        accepted = self.head(head).score(*emb) >= self.threshold(fmr, head)
        return accepted[0] if one else accepted

    def __call__(self, images: np.ndarray, batch: int = 256) -> np.ndarray:
        """Embeds crops.

        Args:
          images: uint8 RGB [n, size, size, 3], framed as the checkpoint's Preprocess says; `read` makes such crops.
          batch: photos at once.

        Returns:
          [n, d] float32, of unit length unless the encoder is dlib's with `unit=False`.

        Raises:
          ValueError: another dtype, size or rank: a mismatched pipeline is refused.
        """
        images = np.asarray(images)
        self._require_crops(images)
        return embed_all(self.embed, self.variables, images, batch)

    def _require_crops(self, images: np.ndarray) -> None:
        if images.dtype != np.uint8:
            raise ValueError(
                f"images are {images.dtype}: expected uint8 RGB, 0-255, before any normalisation; the checkpoint brings "
                "its own. Convert with (images * 255).astype('uint8') if they lie in 0-1."
            )
        if images.ndim != 4 or images.shape[1:] != (self.size, self.size, 3):
            raise ValueError(
                f"images have shape {images.shape}: this checkpoint takes [n, {self.size}, {self.size}, 3]. "
                "embedder.read(paths, framing=…) cuts such crops from photos."
            )

    def layers(self, images: np.ndarray, names: Sequence[str], batch: int = 256) -> dict[str, np.ndarray]:
        """Non-negative features of inner layers, for heads named "HEAD@LAYER" and for chi-square features.

        Args:
          images: as for `__call__`.
          names: "features", or modules of the encoder such as "stage3_block1".
          batch: photos at once.

        Returns:
          name → [n, k] float32 >= 0, not of unit length.

        Raises:
          ValueError: an unknown layer (those that there are, are listed), or images that `__call__` refuses.
        """
        known = self.layer_names
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"this encoder has no layer {unknown[0]!r}; it has {', '.join(known)}.")
        self._require_crops(images)
        read = make_layers(build_encoder(self.config), self.preprocess, tuple(names))
        return embed_all(read, self.variables, np.asarray(images), batch)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """What `layers` can read: "features" and the encoder's modules that stand at its top level."""
        return ("features", *self.variables["params"])

    def read(
        self,
        photos: Sequence[str | Path | np.ndarray],
        framing: str | Square | None = None,
        *,
        face: crops.FaceRule = "largest",
        missed: Literal["error", "centre"] = "error",
    ) -> np.ndarray:
        """Cuts crops from photos.

        Args:
          photos: paths, or uint8 RGB arrays [h, w, 3].
          framing: where the face is: "detect" finds it; a name in `preprocess.FRAMINGS` ("lfw" for deep-funneled LFW,
            "celeba" for aligned CelebA), or a Square; None for photos that are already cropped tightly (the largest
            centred square). An encoder of another template than "portrait" takes "detect" when nothing is given, and a
            Square for photos that are its crops already.
          face: which face is taken where several are found.
          missed: what becomes of a photo without a face: an error that names it, or its middle.

        Returns:
          uint8 RGB [n, size, size, 3].

        Raises:
          ImportError: faces are to be found and the detector is not installed.
          ValueError: no photos, a file that is no whole image, a photo without a face (named), or a framing that is
            unknown or is for another template.
        """
        if missed not in ("error", "centre"):
            raise ValueError(f"missed is {missed!r}: a photo without a face is an 'error', or its 'centre' is taken.")
        if not len(photos):
            raise ValueError("there are no photos to read: give paths or arrays.")
        template = self.preprocess.template
        if framing is None and template != "portrait":
            framing = "detect"
        if isinstance(framing, str) and framing != "detect" and template != "portrait":
            raise ValueError(
                f"framing {framing!r} is for the template 'portrait', and this encoder takes {template!r}. Leave it out: "
                "the face is found."
            )
        aligner = crops.Aligner(template=template, size=self.size, face=face, missed=missed)
        cut = []
        for number, photo in enumerate(photos):
            name = f"photo {number}" if isinstance(photo, np.ndarray) else str(photo)
            if not isinstance(photo, np.ndarray):
                try:
                    photo = sources.decode(Path(photo).read_bytes())
                except ValueError as error:
                    raise ValueError(f"{photo} is no whole image: {error}") from error
            if framing == "detect":
                found = crops.find(photo, aligner)
                if found.face is None and missed == "error":
                    raise ValueError(
                        f"{name}: no face was found. Give a sharper or larger photo, or let its middle be taken: "
                        "read(…, missed='centre')."
                    )
                matrix = (
                    crops.usual_place(None, photo.shape, aligner)
                    if found.face is None
                    else crops.place(found.face, aligner)
                )
                cut.append(crops.draw(photo, matrix, self.size))
            else:
                square = framed_square(framing, photo.shape[1]) if isinstance(framing, str) else framing
                cut.append(crop_square(photo, square, self.size))
        return np.stack(cut)


def load(path: str | Path) -> Embedder:
    """Loads a checkpoint for evaluation.

    Args:
      path: a run directory (its best step is taken), a step directory, or a name in `PRETRAINED` such as "dlib".

    Returns:
      An Embedder.

    Raises:
      FileNotFoundError: if there is no complete checkpoint.
      ImportError: the package that brings a pretrained encoder is not installed.
      ValueError: if its config is of another version, or `policy.json` belongs to other parameters.
    """
    if str(path) in PRETRAINED and not Path(path).exists():
        return PRETRAINED[str(path)]()
    step = checkpoint.find_step(Path(path)).resolve()
    experiment, variables, data = checkpoint.read_evaluation(step)
    return embedder_of(experiment, variables, data, step, step.parents[1] / "policy.json")


def embedder_of(
    experiment: config.Experiment, variables: Any, data: dict[str, Any], path: Path, policy_file: Path
) -> Embedder:
    """An Embedder of variables at hand; the policy is taken if it was made for them."""
    policy = None
    if policy_file.exists():
        policy = json.loads(policy_file.read_text())
        # The policy is of one step, the best; another step of the same run has none.
        if policy["fingerprint"] != checkpoint.fingerprint(variables):
            policy = None
    if experiment.precision == "float64":
        jax.config.update("jax_enable_x64", True)
    return Embedder(
        variables=variables,
        preprocess=experiment.preprocess,
        config=experiment,
        data=data,
        policy=policy,
        path=path,
        embed=make_embed(build_encoder(experiment), experiment.preprocess),
    )


def load_dlib() -> Embedder:
    """dlib's face recognition network: 128 numbers, not of unit length; one person where ‖a - b‖ < 0.6, says its author.

    Raises:
      ImportError: the extra `pretrained` is not installed.
      ValueError: the weights' file is not the known one.
    """
    experiment, variables, data = dlib_checkpoint()
    policy = Path(__file__).parent / "encoders" / "dlib_policy.json"
    return embedder_of(experiment, variables, data, Path("dlib"), policy)


def dlib_checkpoint() -> tuple[config.Experiment, dict[str, Any], dict[str, Any]]:
    """(experiment, variables, data) of dlib's network, as `checkpoint.read_evaluation` gives them."""
    variables = dlib_resnet.read_weights(dlib_resnet.weights_path()) | {"batch_stats": {}}
    experiment = config.Experiment(
        encoder=config.DlibResNet(unit=False), preprocess=PUBLISHED["dlib"], data=config.Data(source="folder:unknown")
    )
    data = {
        "source": "dlib's weights, trained on some 3 million photos that nobody can name",
        "fingerprint": dlib_resnet.SHA256, "people": 0, "photos": 0, "people_hashes": [], "step": 0,
    }  # fmt: skip
    return experiment, variables, data


PRETRAINED: dict[str, Callable[[], Embedder]] = {"dlib": load_dlib}
"""Names that `load` takes beside paths."""

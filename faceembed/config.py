"""An experiment as data: frozen dataclasses, checked when they are made, stored as JSON with the types' names.

Nothing here imports JAX, so that a mistyped flag is answered at once.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from typing import Any, Literal

from faceembed.preprocess import Preprocess

SOURCES = ("synthetic", "celeba", "lfw", "celeba_lfw")
"""Sources that go by a name of their own."""
FORMS = ("folder:PATH", "insightface:PATH", "prepared:NAME")
"""Sources that say which one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where the photos come from."""

    source: str = "synthetic"
    """synthetic | celeba | lfw | celeba_lfw (CelebA and the people of LFW's peopleDevTrain) | folder:PATH (one folder a
    person) | insightface:PATH (train.rec) | prepared:NAME (what data prepare insightface wrote)."""
    data_dir: str | None = None
    """Where prepared sets are kept; $FACEEMBED_DATA or ~/.cache/faceembed/data when not given."""
    people: int = 400
    """Identities drawn by the synthetic source; others ignore it."""
    photos: int = 12
    """Photos of each identity drawn by the synthetic source; others ignore it."""
    margin: float = 1.125
    """Training crops keep this much more around the square, for augmentation to move within."""
    memory_gb: float = 4.0
    """A set whose crops fit into this is decoded once into memory; a larger one is read as it is used."""
    exclude: str | None = None
    """File of photos that are not trained on, a key a line, such as exclude.txt of `data audit`. People who are held out
    keep all of theirs, so that runs with and without it are tested on the same."""

    def __post_init__(self) -> None:
        # Only the form is checked: a checkpoint's config must load where its photos are not.
        kind, _, path = self.source.partition(":")
        if self.source not in SOURCES and not (path and kind in [form.partition(":")[0] for form in FORMS]):
            examples = {
                "folder": "folder:/photos",
                "insightface": "insightface:/ms1mv3/train.rec",
                "prepared": "prepared:ms1mv3",
            }
            near = difflib.get_close_matches(kind, [*SOURCES, *examples], 1) or ["folder"]
            raise ValueError(
                f"data.source is {self.source!r}, which is not one of {', '.join((*SOURCES, *FORMS))}. "
                f"Try --data.source {examples.get(near[0], near[0])}."
            )
        if self.people < 1 or self.photos < 1:
            raise ValueError(
                f"data.people is {self.people} and data.photos {self.photos}: nobody would be drawn. "
                "Try --data.people 400 --data.photos 12."
            )
        if not 1.0 <= self.margin <= 2.0:
            raise ValueError(f"data.margin is {self.margin}: it enlarges the square, 1 to 2. Try --data.margin 1.125.")
        if not 0 <= self.memory_gb < math.inf:
            raise ValueError(
                f"data.memory_gb is {self.memory_gb}: 0 reads from disk, more is kept. Try --data.memory-gb 4."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """P people × K photos."""

    people: int = 32
    """P, people a batch, over all devices."""
    photos: int = 4
    """K, photos of each; people with fewer give what they have and more people fill the batch."""
    singletons: float = 0.1
    """Largest share of the batch given to people with a single photo; they serve as negatives only."""
    microbatches: int = 1
    """Chunks that the photos of each device are encoded in, for batches larger than memory: the loss, and its gradient, is
    still that of the whole batch, at the price of encoding twice. Batch normalisation sees a chunk at a time."""
    accumulate: int = 1
    """Chunks that each have a loss of their own, the mean of which is trained: for losses over single photos, which it
    leaves as they are. Batch normalisation sees a chunk at a time."""

    def __post_init__(self) -> None:
        if self.photos < 2:
            raise ValueError(
                f"batch.photos is {self.photos}: with one photo a person no anchor has a positive. Try --batch.photos 4."
            )
        if self.people < 2:
            raise ValueError(
                f"batch.people is {self.people}: with one person no anchor has a negative. Try --batch.people 32."
            )
        if not 0 <= self.singletons < 1:
            raise ValueError(f"batch.singletons is {self.singletons}: it is a share, 0 ≤ share < 1. Try 0.1.")
        for name in ("microbatches", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"batch.{name} is {getattr(self, name)}: it counts chunks, and 1 is the whole batch. "
                    f"Try --batch.{name} 1."
                )
        if self.microbatches > 1 and self.accumulate > 1:
            raise ValueError(
                f"batch.microbatches is {self.microbatches} and batch.accumulate {self.accumulate}: they are two ways to "
                "take a batch in chunks, with one loss or with a loss a chunk. Leave one of them out."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvNet:
    """A small residual network of 3×3 convolutions, for a CPU and 64 px."""

    widths: tuple[int, ...] = (16, 48, 96, 192)
    """Channels of each stage; every stage halves the resolution."""
    blocks: tuple[int, ...] = (1, 2, 2, 1)
    """Residual blocks in each stage."""
    dim: int = 128
    """Numbers in an embedding."""

    def __post_init__(self) -> None:
        if not self.widths or len(self.widths) != len(self.blocks) or min(*self.widths, *self.blocks) < 1:
            raise ValueError(
                f"encoder.widths is {self.widths} and encoder.blocks {self.blocks}: give one of each for every stage, "
                "1 or more, such as --encoder.widths 16 48 96 192 --encoder.blocks 1 2 2 1."
            )
        _check_dim(self.dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MobileFaceNet:
    """MobileFaceNet (Chen et al. 2018), 1 M parameters, native at 112 px."""

    dim: int = 128
    """Numbers in an embedding."""

    def __post_init__(self) -> None:
        _check_dim(self.dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IResNet:
    """ArcFace's improved ResNet (Deng et al. 2019), native at 112 px."""

    depth: Literal[18, 34, 50, 100] = 50
    """Layers."""
    dropout: float = 0.0
    """Share of the last map that is dropped in training; arcface_torch drops none."""
    dim: int = 512
    """Numbers in an embedding."""

    def __post_init__(self) -> None:
        _check_dim(self.dim)
        _check_drop("dropout", self.dropout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InceptionResNetV1:
    """Inception-ResNet-v1 (Szegedy et al. 2016), FaceNet's line: native at 160 px, 75 at least."""

    dropout: float = 0.6
    """Share of the pooled map that is dropped in training; facenet-pytorch drops 0.6."""
    dim: int = 512
    """Numbers in an embedding."""

    def __post_init__(self) -> None:
        _check_dim(self.dim)
        _check_drop("dropout", self.dropout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViT:
    """A small vision transformer (InsightFace's ViT-T), native at 112 px."""

    patch: int = 8
    """Side of a patch in pixels; it divides preprocess.size."""
    width: int = 256
    """Channels of a patch."""
    depth: int = 12
    """Blocks of attention and MLP."""
    heads: int = 8
    """Attention heads; they divide the width."""
    drop_path: float = 0.1
    """Stochastic depth: share of photos that skip a branch of the last block; it grows from 0 in the first."""
    dim: int = 512
    """Numbers in an embedding."""

    def __post_init__(self) -> None:
        _check_dim(self.dim)
        _check_drop("drop_path", self.drop_path)
        for name, usual in (("patch", 8), ("width", 256), ("depth", 12), ("heads", 8)):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"encoder.{name} is {getattr(self, name)}: it counts from 1. Try --encoder.{name} {usual}."
                )
        if self.width % self.heads:
            raise ValueError(
                f"encoder.width is {self.width} and encoder.heads {self.heads}: each head takes an equal share of the "
                f"channels. Try --encoder.width {max(1, round(self.width / self.heads)) * self.heads}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DlibResNet:
    """dlib's face recognition network (King 2017), a ResNet-29 without batch normalisation, native at 150 px."""

    unit: bool = True
    """Embeddings of unit length; dlib's own have not."""
    dim: int = 128
    """Numbers in an embedding."""

    def __post_init__(self) -> None:
        _check_dim(self.dim)


def _check_drop(name: str, share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(
            f"encoder.{name} is {share}: it is a share, 0 (off) ≤ {name} < 1. "
            f"Try --encoder.{name.replace('_', '-')} 0.1."
        )


def _check_dim(dim: int) -> None:
    if dim < 1:
        raise ValueError(f"encoder.dim is {dim}: an embedding has at least one number. Try --encoder.dim 128.")


Miner = Literal["random", "hardest", "semi_hard", "all", "semi_hard_all"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Triplet:
    """Triplet loss max(d(A,P) - d(A,N) + α, 0) with online mining (Schroff et al. 2015)."""

    margin: float = 0.2
    """Squared-Euclidean margin α; FaceNet uses 0.2."""
    miner: Miner = "semi_hard"
    """Which triplets of the global batch are used."""
    last_miner: Miner | None = None
    """Which are used in the last part of the training, such as hardest after semi_hard; None: the same to the end."""
    last_share: float = 0.25
    """How much of the training that last part is, as a share of its steps."""
    tile: int | None = None
    """Candidates that a device looks at together: memory grows with the batch, not with its square. None chooses; 0 makes a
    table of all distances. The loss is the same but for rounding."""
    memory: int = 0
    """Embeddings of earlier batches that are kept as more negatives (Wang et al. 2020); 0 for none."""
    memory_after: int = 0
    """Updates before they are used: at first an encoder changes too fast for its old embeddings to mean much."""
    groups: int = 1
    """The batch is mined in so many separate parts, as that many devices would that do not gather; an ablation."""

    def __post_init__(self) -> None:
        if self.tile is not None and self.tile < 0:
            raise ValueError(
                f"loss.tile is {self.tile}: it counts candidates. Try --loss.tile None, which chooses, or --loss.tile 256."
            )
        for name, usual in (("memory", "--loss.memory 4096"), ("memory_after", "--loss.memory-after 1000")):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}: it counts from 0. Try {usual}.")
        if self.memory_after and not self.memory:
            raise ValueError(
                f"loss.memory_after is {self.memory_after}, and there is no memory to wait for. "
                "Try --loss.memory 4096 beside it, or leave it out."
            )
        if self.groups < 1:
            raise ValueError(
                f"loss.groups is {self.groups}: it counts from 1, the whole batch mined together. Try --loss.groups 1."
            )
        if self.groups > 1 and self.memory:
            raise ValueError(
                f"loss.groups is {self.groups} and loss.memory {self.memory}: parts that are mined alone would share "
                "a memory of all of them. Give one of the two."
            )
        if not 0 < self.last_share < 1:
            raise ValueError(
                f"loss.last_share is {self.last_share}: it is a share of the steps, 0 < share < 1. "
                "Try --loss.last-share 0.25."
            )
        if not 0 < self.margin < math.inf:
            raise ValueError(
                f"loss.margin is {self.margin}: without a margin one point for every face has zero loss. "
                "Try --loss.margin 0.2."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrastive:
    """Siamese contrastive loss over all pairs of the global batch (Hadsell, Chopra & LeCun 2006)."""

    margin: float = 1.0
    """Impostor pairs closer than this Euclidean distance are pushed apart."""

    def __post_init__(self) -> None:
        if not 0 < self.margin < math.inf:
            raise ValueError(f"loss.margin is {self.margin}: no impostor pair is closer. Try --loss.margin 1.0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairLogistic:
    """Logistic regression on |f(a)-f(b)| over all pairs, trained end to end (Taigman et al. 2014)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosFace:
    """Softmax over all training people, the own cosine lowered by a margin (Wang et al. 2018)."""

    scale: float = 64.0
    """s that multiplies cosines. The paper's 64 is for millions of photos; a small network with thousands may want less."""
    margin: float = 0.35
    """m taken off the own cosine; the paper's, and 0 is none. Start lower where the loss does not fall."""
    sample: float = 1.0
    """Share of the people that serve as negatives in an update, beside those of the batch (Partial FC, An et al. 2022)."""

    def __post_init__(self) -> None:
        _check_margin_softmax(self.scale, self.sample)
        if not 0 <= self.margin < 1:
            raise ValueError(
                f"loss.margin is {self.margin}: it is taken off a cosine, 0 ≤ margin < 1. Try --loss.margin 0.35."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArcFace:
    """Softmax over all training people, the own angle enlarged by a margin (Deng et al. 2019)."""

    scale: float = 64.0
    """s that multiplies cosines. The paper's 64 is for millions of photos; a small network with thousands may want less."""
    margin: float = 0.5
    """m added to the own angle, in radians; the paper's, and 0 is none. Start lower where the loss does not fall."""
    sample: float = 1.0
    """Share of the people that serve as negatives in an update, beside those of the batch (Partial FC, An et al. 2022)."""

    def __post_init__(self) -> None:
        _check_margin_softmax(self.scale, self.sample)
        if not 0 <= self.margin < math.pi / 2:
            raise ValueError(
                f"loss.margin is {self.margin}: it is an angle in radians, 0 ≤ margin < 1.57. Try --loss.margin 0.5."
            )


def _check_margin_softmax(scale: float, sample: float) -> None:
    if not 0 < scale < math.inf:
        raise ValueError(f"loss.scale is {scale}: it multiplies cosines, 0 < scale. Try --loss.scale 64.")
    if not 0 < sample <= 1:
        raise ValueError(
            f"loss.sample is {sample}: it is the share of people that serve as negatives, 0 < sample ≤ 1. "
            "Try --loss.sample 1, which takes all, or 0.1."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (Loshchilov & Hutter 2019)."""

    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.999
    """Decay of the second moment."""

    def __post_init__(self) -> None:
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"optimizer.{name} is {getattr(self, name)}: a decay lies in 0 ≤ {name} < 1. "
                    f"Try --optimizer.{name} {'0.9' if name == 'b1' else '0.999'}."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD:
    """SGD with Nesterov momentum."""

    momentum: float = 0.9
    """Decay of the velocity."""

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"optimizer.momentum is {self.momentum}: it lies in 0 ≤ momentum < 1. Try --optimizer.momentum 0.9."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Step size and what surrounds it, for any optimizer."""

    learning_rate: float = 2e-3
    """Peak, reached at the end of the warm-up; a cosine takes it to a hundredth of that by the last step."""
    warmup: int = 200
    """Steps of linear warm-up."""
    weight_decay: float = 1e-4
    """Decoupled; norms, biases and PReLU slopes are spared."""
    clip_norm: float = 1.0
    """Gradients longer than this (global L2 norm) are scaled down to it."""
    ema: float = 0.999
    """Decay of the moving averages of parameters and batch statistics that evaluation uses; 0 turns them off."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"schedule.learning_rate is {self.learning_rate}: nothing would be learned. "
                "Try --schedule.learning-rate 1e-3."
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"schedule.ema is {self.ema}: a decay lies in 0 ≤ ema < 1. Try --schedule.ema 0.999.")
        if not self.clip_norm > 0:
            raise ValueError(
                f"schedule.clip_norm is {self.clip_norm}: every gradient would vanish. Try --schedule.clip-norm 1."
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"schedule.weight_decay is {self.weight_decay}: weights would grow. Try --schedule.weight-decay 1e-4."
            )
        if self.warmup < 0:
            raise ValueError(f"schedule.warmup is {self.warmup}: steps cannot be negative. Try --schedule.warmup 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Augmentation on the device, keyed by (seed, step, slot in the batch)."""

    flip: bool = True
    """Mirror half of the photos."""
    rotation: float = 10.0
    """Largest rotation, degrees either way."""
    scale: float = 0.1
    """Largest change of size, as a share."""
    shift: float = 0.05
    """Largest shift, as a share of the side."""
    colour: float = 0.3
    """Strength of brightness, contrast, saturation and channel gain, 0 to 1."""
    grey: float = 0.15
    """Share of photos turned grey."""
    erase: float = 0.3
    """Share of photos with a rectangle replaced by noise."""
    degrade: float = 0.2
    """Share of photos blurred as a smaller one enlarged would be."""

    def __post_init__(self) -> None:
        for name in ("grey", "erase", "degrade"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ValueError(
                    f"augment.{name} is {share}: it is a share of photos, 0 to 1. Try --augment.{name} 0.2."
                )
        for name, top in (("rotation", 180.0), ("scale", 0.9), ("shift", 1.0), ("colour", 1.0)):
            if not 0 <= getattr(self, name) <= top:
                raise ValueError(
                    f"augment.{name} is {getattr(self, name)}: allowed are 0 (off) to {top:g}. Try --augment.{name} 0."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When to save, to evaluate and to log, in steps."""

    every: int = 500
    """Save and evaluate on select people."""
    log: int = 50
    """Write metrics; the host waits for the device only then."""
    keep_best: int = 1
    """Best steps kept beside the latest two."""

    def __post_init__(self) -> None:
        for name in ("every", "log", "keep_best"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(
                    f"checkpoint.{name} is {getattr(self, name)}: it counts from 1. Try --checkpoint.{flag} 100."
                )


Encoder = ConvNet | MobileFaceNet | IResNet | InceptionResNetV1 | ViT | DlibResNet
Loss = Triplet | Contrastive | PairLogistic | CosFace | ArcFace
Optimizer = AdamW | SGD

# `--encoder NAME`, `--loss NAME`, `--optimizer NAME` put another member into the union.
CHOICES: dict[str, dict[str, Any]] = {
    "encoder": {
        "convnet": ConvNet(),
        "mobilefacenet": MobileFaceNet(),
        **{f"iresnet{depth}": IResNet(depth=typing.cast(Any, depth)) for depth in (18, 34, 50, 100)},
        "inception_resnet_v1": InceptionResNetV1(),
        "vit": ViT(),
        "dlib_resnet": DlibResNet(),
    },
    "loss": {
        "triplet": Triplet(),
        "contrastive": Contrastive(),
        "pair_logistic": PairLogistic(),
        "cosface": CosFace(),
        "arcface": ArcFace(),
    },
    "optimizer": {"adamw": AdamW(), "sgd": SGD()},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that decides what is trained; two equal experiments train the same network."""

    steps: int = 1000
    """Updates in all."""
    seed: int = 0
    """Every random number follows from it."""
    init: str | None = None
    """Checkpoint to start from: a run directory, a step of one, or a pretrained name such as dlib. Layers of another shape,
    as with another --encoder.dim, start afresh."""
    freeze: tuple[str, ...] = ()
    """Layers that stay as they are, their batch statistics too: patterns such as 'stem*' 'block[1-9]'."""
    layer_rates: tuple[str, ...] = ()
    """PATTERN=FACTOR, such as 'block*=0.1': these layers' learning rate times the factor; the last that fits counts."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of the encoder's computation; parameters and losses stay float32 under bfloat16. float64 is for comparisons."""
    data: Data = Data()
    preprocess: Preprocess = Preprocess()
    encoder: Encoder = ConvNet()
    batch: Batch = Batch()
    loss: Loss = Triplet()
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Schedule()
    augment: Augment = Augment()
    checkpoint: Checkpoint = Checkpoint()

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}: nothing would be trained. Try --steps 1000.")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}: expected 0 to 2147483647. Try --seed 0.")
        size = self.batch.people * self.batch.photos
        if isinstance(self.loss, Triplet) and size % self.loss.groups:
            multiple = self.loss.groups // math.gcd(self.loss.groups, self.batch.photos)
            raise ValueError(
                f"loss.groups is {self.loss.groups}, and a batch of {size} (people={self.batch.people} × "
                f"photos={self.batch.photos}) does not divide into so many groups. "
                f"Try --batch.people {-(-self.batch.people // multiple) * multiple}."
            )
        if self.batch.accumulate > 1 and not isinstance(self.loss, CosFace | ArcFace):
            raise ValueError(
                f"batch.accumulate is {self.batch.accumulate}, and the loss {type(self.loss).__name__} compares photos: it "
                "would do so within each chunk only. "
                f"Try --batch.microbatches {self.batch.accumulate}, which compares those of the whole batch."
            )
        if self.batch.accumulate > 1 and isinstance(self.loss, CosFace | ArcFace) and self.loss.sample < 1:
            raise ValueError(
                f"batch.accumulate is {self.batch.accumulate} and loss.sample {self.loss.sample}: a photo would be "
                "compared with the people drawn and those of its chunk, not of the batch, which is another loss. "
                f"Try --batch.microbatches {self.batch.accumulate}, which is exact, or --loss.sample 1."
            )
        if isinstance(self.loss, Triplet) and self.loss.memory_after >= self.steps:
            raise ValueError(
                f"loss.memory_after is {self.loss.memory_after} and steps {self.steps}: the memory would never be used. "
                f"Try --loss.memory-after {self.steps // 10}."
            )


def encoder_name(encoder: Encoder) -> str:
    """The name in `faceembed.encoders.ENCODERS` of a configured encoder."""
    match encoder:
        case ConvNet():
            return "convnet"
        case MobileFaceNet():
            return "mobilefacenet"
        case IResNet():
            return f"iresnet{encoder.depth}"
        case InceptionResNetV1():
            return "inception_resnet_v1"
        case ViT():
            return "vit"
        case DlibResNet():
            return "dlib_resnet"


_TYPES = {
    cls.__name__: cls
    for cls in (
        Experiment, Data, Preprocess, Batch, ConvNet, MobileFaceNet, IResNet, InceptionResNetV1, ViT, DlibResNet, Triplet,
        Contrastive, PairLogistic, CosFace, ArcFace, AdamW, SGD, Schedule, Augment, Checkpoint,
    )
}  # fmt: skip


def to_json(value: Any) -> str:
    """A config dataclass as JSON; every object carries its type's name, so unions read back as what they were."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return {"type": type(value).__name__, **fields}
        return value

    return json.dumps(plain(value), indent=1) + "\n"


def from_json(text: str) -> Any:
    """Reads what `to_json` wrote.

    Raises:
      ValueError: if the text is no JSON, names a type or field this version does not have, or holds a bad value.
    """

    def build(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(build(item) for item in value)
        if not isinstance(value, dict):
            return value
        name = value.get("type")
        cls = _TYPES.get(name) if isinstance(name, str) else None
        if cls is None:
            raise ValueError(f"config has an object of type {name!r}; this version knows {', '.join(sorted(_TYPES))}.")
        hints = typing.get_type_hints(cls)
        fields = {key: build(item) for key, item in value.items() if key != "type"}
        for key, item in fields.items():
            if key not in hints:
                near = difflib.get_close_matches(key, hints, 1)
                hint = f"; did a newer version write it, or is {near[0]!r} meant?" if near else "; a newer version may."
                raise ValueError(f"config: {name} has no field {key!r}{hint}")
            if not _fits(item, hints[key]):
                raise ValueError(f"config: {name}.{key} is {item!r}, expected {hints[key]}.")
        return cls(**fields)

    try:
        return build(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"config is not JSON: {error}. Was the file cut off?") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is of an annotated type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)

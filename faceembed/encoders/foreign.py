"""Pretrained weights of other projects, read into our encoders.

    FORMATS["insightface-onnx"](Path("w600k_r50.onnx")) → Foreign(encoder, preprocess, variables, notes)

An ONNX file is walked from its input on, by what is connected to what: the names in such files are numbers that an
exporter gave. Whatever the walk does not meet was not expected, and is refused by name; so is what it meets in another
shape. Nothing of a file is executed: ONNX files are read and not run, PyTorch files are loaded with `weights_only`.
"""

import dataclasses
import functools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from faceembed import config
from faceembed.encoders import dlib_resnet, layers, make_encoder
from faceembed.preprocess import PUBLISHED, Preprocess


@dataclasses.dataclass(frozen=True, kw_only=True)
class Foreign:
    """What a foreign file holds, in our terms."""

    encoder: config.Encoder
    preprocess: Preprocess
    """As the network's own project prepares a photo."""
    variables: dict[str, Any]
    """{"params", "batch_stats"}, float32 NumPy arrays in the tree of `encoder`'s module."""
    notes: tuple[str, ...]
    """What was left out or assumed, a sentence each."""


_MOST_BYTES = 1 << 30
"""Of all arrays of an .npz file, unpacked."""


class _Refused(ValueError):
    """What a walk says itself."""


def _walked(read: Callable[[Path], Foreign]) -> Callable[[Path], Foreign]:
    """ONNX attributes may be of any type: what NumPy or Python then trip over is told as a damaged file."""

    @functools.wraps(read)
    def told(path: Path) -> Foreign:
        try:
            return read(path)
        except _Refused:
            raise
        except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: holds a node that this format does not have ({type(error).__name__}: {error}). Export the "
                "network again."
            ) from error

    return told


# ---- InsightFace's recognition networks ------------------------------------------------------------------------------

_DEPTHS: dict[tuple[int, ...], Any] = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 34, (3, 4, 14, 3): 50, (3, 13, 30, 3): 100}
_WIDTHS = (64, 128, 256, 512)


@_walked
def read_insightface_onnx(path: Path) -> Foreign:
    """An `iresnet` of InsightFace as its arcface_torch exports it, such as w600k_r50.onnx or glintr100.onnx.

    Batch norms may be part of the convolution before them, as an export for evaluation leaves them, or nodes of their
    own. Older files, converted from MXNet, subtract and scale in the graph itself; that becomes `preprocess`.

    Args:
      path: the ONNX file, weights inside; input [b, 3, 112, 112], output [b, d].

    Returns:
      An `IResNet` of the depth found, for 112 px, read as `preprocess.PUBLISHED["insightface"]` says.

    Raises:
      ValueError: a damaged file, another network, or a tensor that is missing, has another shape or was not expected.
      ImportError: the package onnx is not installed.
    """
    walk = _Walk(
        path,
        "insightface-onnx reads arcface_torch's iresnet18, 34, 50 and 100 for 112 px. For another network try another "
        "format; for another depth export the network again.",
    )
    x, own = walk.normalisation(walk.input)
    x = walk.convolution(x, "stem_conv", "stem_bn", 64, 3, window=3)
    x = walk.prelu(x, "stem_prelu", 64)
    counts: list[int] = []
    # A block reads its input twice, the last batch norm once.
    while len(found := walk.readers(x)) > 1:
        if any(node.op == "Conv" for node in found):
            counts.append(0)
        if not 1 <= len(counts) <= len(_WIDTHS):
            raise walk.error(
                f"the blocks that read tensor {x!r} belong to stage {len(counts)}, expected stages 1 to 4, each of which "
                "begins with a strided shortcut."
            )
        counts[-1] += 1
        width, entry = _WIDTHS[len(counts) - 1], counts[-1] == 1
        inputs = _WIDTHS[max(0, len(counts) - 2)] if entry else width
        block = f"stage{len(counts)}_block{counts[-1]}"
        y = walk.norm(x, f"{block}/bn1", inputs)
        y = walk.convolution(y, f"{block}/conv1", f"{block}/bn2", width, inputs, window=3)
        y = walk.prelu(y, f"{block}/prelu", width)
        strides = 2 if entry else 1
        y = walk.convolution(y, f"{block}/conv2", f"{block}/bn3", width, width, window=3, strides=strides)
        if entry:
            x = walk.convolution(x, f"{block}/shortcut", f"{block}/shortcut_bn", width, inputs, window=1, strides=2)
        x = walk.add(x, y, block)
    if tuple(counts) not in _DEPTHS:
        known = ", ".join(f"{blocks} of iresnet{depth}" for blocks, depth in _DEPTHS.items())
        raise walk.error(
            f"the four stages have {tuple(counts)} blocks, up to tensor {x!r}, expected {known.replace(',)', ')')}."
        )
    x = walk.norm(x, "final_bn", 512)
    kernel, bias, x = walk.dense(x, "embedding", 512 * 7 * 7)
    x, factor = walk.scaled_norm(x, "embedding_bn", kernel.shape[1], following=bias is not None)
    walk.put("params", "embedding/kernel", _from_chw(kernel, 512, 7) * factor)
    walk.put("params", "embedding/bias", (np.zeros(kernel.shape[1]) if bias is None else bias) * factor)
    walk.finish(x)
    preprocess, notes = _as_published(own, walk.folded)
    return Foreign(
        encoder=config.IResNet(depth=_DEPTHS[tuple(counts)], dim=kernel.shape[1]),
        preprocess=preprocess,
        variables=walk.variables,
        notes=tuple(notes),
    )


# ---- MobileFaceNet ---------------------------------------------------------------------------------------------------

# (channels after the expansion, channels out, strides of the first, how many): table 1 of Chen et al. 2018.
_BOTTLENECKS = ((128, 64, 2, 5), (256, 128, 2, 1), (256, 128, 1, 6), (512, 128, 2, 1), (256, 128, 1, 2))


@_walked
def read_mobilefacenet_onnx(path: Path) -> Foreign:
    """A MobileFaceNet with the layers of the paper's table 1, as PyTorch implementations of it are exported.

    Its last layer may be a 1×1 convolution or a matrix, and the file may give the embeddings unit length or not.

    Args:
      path: the ONNX file, weights inside; input [b, 3, 112, 112], output [b, d].

    Returns:
      A `MobileFaceNet` for 112 px, read as `preprocess.PUBLISHED["insightface"]` says.

    Raises:
      ValueError: a damaged file, another network, or a tensor that is missing, has another shape or was not expected.
      ImportError: the package onnx is not installed.
    """
    walk = _Walk(
        path,
        "mobilefacenet-onnx reads the network of Chen et al. 2018, table 1, for 112 px. InsightFace's w600k_mbf is twice "
        "as wide and has no counterpart here; for an iresnet try insightface-onnx.",
    )
    x, own = walk.normalisation(walk.input)
    x = walk.convolution(x, "stem_conv", "stem_bn", 64, 3, window=3, strides=2)
    x = walk.prelu(x, "stem_prelu", 64)
    x = walk.convolution(x, "stem_depthwise", "stem_depthwise_bn", 64, 64, window=3, groups=64)
    x = walk.prelu(x, "stem_depthwise_prelu", 64)
    inputs = 64
    for stage, (wide, width, first, count) in enumerate(_BOTTLENECKS, start=1):
        for number in range(1, count + 1):
            block, strides = f"stage{stage}_block{number}", first if number == 1 else 1
            y = walk.convolution(x, f"{block}/expand", f"{block}/expand_bn", wide, inputs, window=1)
            y = walk.prelu(y, f"{block}/expand_prelu", wide)
            y = walk.convolution(
                y, f"{block}/depthwise", f"{block}/depthwise_bn", wide, wide, window=3, strides=strides, groups=wide
            )
            y = walk.prelu(y, f"{block}/depthwise_prelu", wide)
            y = walk.convolution(y, f"{block}/project", f"{block}/project_bn", width, wide, window=1)
            x = walk.add(x, y, block) if strides == 1 and inputs == width else y
            inputs = width
    x = walk.convolution(x, "separable", "separable_bn", 512, 128, window=1)
    x = walk.prelu(x, "separable_prelu", 512)
    x = walk.convolution(x, "global_depthwise", "global_bn", 512, 512, window=7, groups=512, padded=False)
    if [node.op for node in walk.readers(x)] == ["Conv"]:
        weights, bias, x = walk.kernel(x, "embedding", None, 512, window=1)
        kernel = weights[:, :, 0, 0].T
    else:
        kernel, bias, x = walk.dense(x, "embedding", 512)
    walk.put("params", "embedding/kernel", kernel)
    x = walk.flat(walk.norm(x, "embedding_bn", kernel.shape[1], bias))
    walk.finish(x)
    preprocess, notes = _as_published(own, walk.folded)
    if own is None:
        notes.append(
            "A MobileFaceNet file does not say how its photos were prepared: RGB and (x - 127.5) / 127.5 are assumed. "
            "Some divide by 128, and some take BGR."
        )
    return Foreign(
        encoder=config.MobileFaceNet(dim=kernel.shape[1]),
        preprocess=preprocess,
        variables=walk.variables,
        notes=tuple(notes),
    )


def _from_chw(kernel: np.ndarray, channels: int, side: int) -> np.ndarray:
    """Rows of a matrix that reads a flattened [c, h, w] map, put into the order of a flattened [h, w, c] one."""
    return kernel.reshape(channels, side, side, -1).transpose(1, 2, 0, 3).reshape(kernel.shape)


def _as_published(own: tuple[float, float] | None, folded: int) -> tuple[Preprocess, list[str]]:
    """InsightFace's preprocessing, with the mean and scale of a graph that normalises by itself, and what to say of it."""
    preprocess, notes = PUBLISHED["insightface"], []
    if own is not None:
        mean, scale = own
        preprocess = dataclasses.replace(preprocess, mean=mean, scale=scale)
        notes.append(f"The file itself computes (x - {mean:g}) / {scale:g}; that is in preprocess now.")
    if folded:
        notes.append(
            f"{folded} batch norms are part of the layers before them, and what they had measured is lost: embeddings are "
            "the file's, but training would measure anew and so begin from another function. When training from it, keep "
            "them as they are: --freeze '*bn*'."
        )
    return preprocess, notes


# ---- facenet-pytorch -------------------------------------------------------------------------------------------------


def read_facenet_pytorch(path: Path) -> Foreign:
    """facenet-pytorch's InceptionResnetV1, such as 20180402-114759-vggface2.pt.

    Args:
      path: its state dict: .safetensors or .npz, which need nothing else, or a file of `torch.save`, which needs torch.

    Returns:
      An `InceptionResNetV1` for 160 px, read as `preprocess.PUBLISHED["facenet-pytorch"]` says.

    Raises:
      ValueError: a damaged file, another network, or a tensor that is missing, has another shape or was not expected.
      ImportError: the file needs torch, which is not installed.
    """
    state = _read_state(path)
    notes = []
    if classifier := sorted(name for name in state if name in ("logits.weight", "logits.bias")):
        notes.append(f"Left out, since an embedding does not need the classifier: {' and '.join(classifier)}.")
    for name in list(state):
        if name in classifier or (name.endswith(".num_batches_tracked") and state[name].size == 1):
            del state[name]
    hint = "Try a state dict of facenet-pytorch's InceptionResnetV1: torch.save(network.state_dict(), FILE)."
    if "last_linear.weight" not in state or state["last_linear.weight"].ndim != 2:
        found = f"of shape {list(state['last_linear.weight'].shape)}" if "last_linear.weight" in state else "missing"
        raise ValueError(f"{path}: tensor 'last_linear.weight' is {found}, expected [d, 1792]. {hint}")
    encoder = config.InceptionResNetV1(dim=state["last_linear.weight"].shape[0])
    shapes = _shapes(make_encoder("inception_resnet_v1", dim=encoder.dim), 160)
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for place, shape in shapes.items():
        name = _facenet_name(place)
        if name not in state:
            raise ValueError(f"{path}: tensor {name!r} is missing, expected for {place}. {hint}")
        array = state.pop(name)
        axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[len(shape)]
        expected = [shape[axes.index(axis)] for axis in range(len(shape))]
        if list(array.shape) != expected:
            raise ValueError(f"{path}: tensor {name!r} has shape {list(array.shape)}, expected {expected}. {hint}")
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"{path}: tensor {name!r} is {array.dtype}, expected floats. {hint}")
        if not _finite(array):
            raise ValueError(f"{path}: tensor {name!r} holds values that are not finite in float32. {hint}")
        if name.endswith("running_var") and array.min() < 0:
            raise ValueError(f"{path}: tensor {name!r} holds variances below 0. {hint}")
        _put(variables, place, array.transpose(axes))
    if state:
        others = f" and {len(state) - 1} more" if len(state) > 1 else ""
        raise ValueError(f"{path}: tensor {min(state)!r}{others} was not expected. {hint}")
    return Foreign(
        encoder=encoder,
        preprocess=PUBLISHED["facenet-pytorch"],
        variables=variables,
        notes=tuple(notes),
    )


def _facenet_name(place: str) -> str:
    """facenet-pytorch's name of a leaf of our tree, such as params/block17_1/branch1_0/bn/scale."""
    *modules, leaf = place.split("/")[1:]
    name = ".".join(modules)
    name = re.sub(r"^block8_6\b", "block8", name)
    kinds = {"35": "repeat_1", "17": "repeat_2", "8": "repeat_3"}
    name = re.sub(r"^block(\d+)_(\d+)", lambda match: f"{kinds[match[1]]}.{int(match[2]) - 1}", name)
    name = re.sub(r"(branch\d)_(\d)", r"\1.\2", name)
    name = {"embedding": "last_linear", "embedding_bn": "last_bn"}.get(name, name)
    leaves = {"scale": "weight", "mean": "running_mean", "var": "running_var", "kernel": "weight", "bias": "bias"}
    return f"{name}.conv2d.bias" if leaf == "conv2d_bias" else f"{name}.{leaves[leaf]}"


def _read_state(path: Path) -> dict[str, np.ndarray]:
    """Named tensors of a .safetensors, .npz or `torch.save` file."""
    _check_file(path)
    match path.suffix:
        case ".safetensors":
            return _read_safetensors(path)
        case ".npz":
            try:
                # NumPy leaves a path that it opened itself open when the archive is damaged.
                with open(path, "rb") as stream, zipfile.ZipFile(stream) as archive:
                    declared = sum(member.file_size for member in archive.infolist())
                    if declared > _MOST_BYTES:  # zeros compress a thousandfold
                        raise ValueError(f"its arrays take {declared / 1e9:,.1f} GB, and this network's 0.2")
                with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
                    return {name: file[name] for name in file.files}
            except Exception as error:  # zip, zlib and NumPy each raise their own kinds
                raise ValueError(f"{path} is not a whole .npz file of plain arrays: {error}. Get it again.") from error
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"{path} is a file of torch.save, and reading one needs torch: pip install torch --index-url "
            "https://download.pytorch.org/whl/cpu. Or, where torch is, write its state dict as .safetensors or .npz: "
            "numpy.savez(FILE, **{name: value.numpy() for name, value in state.items()})"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise one of half a dozen kinds, a pickle of code another
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} cannot be read as tensors only ({type(error).__name__}: {reason}): it is cut off, or holds objects "
            "beside tensors, which are never loaded. Get it again, or write torch.save(network.state_dict(), FILE)."
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a state dict. Try network.state_dict().")
    arrays = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{path}: {name!r} is a {type(value).__name__}, expected a tensor. If the state dict lies inside of it, "
                "write that one alone: torch.save(state, FILE)."
            )
        arrays[str(name)] = value.detach().to(torch.float32).numpy() if value.is_floating_point() else value.numpy()
    return arrays


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError(
            f"reading {path} needs the package safetensors, which is not installed. Install the optional extra: "
            "pip install 'faceembed[import]', or in a checkout: pip install -e '.[import]'"
        ) from None
    try:
        return safetensors.numpy.load_file(path)
    except Exception as error:  # SafetensorError, or a type of numbers that NumPy has not
        raise ValueError(
            f"{path} is not a whole .safetensors file ({path.stat().st_size:,} bytes: {error}). Get it again; tensors "
            "of another type than float32, float16 or float64 are to be written as float32."
        ) from error


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is {'a folder' if path.is_dir() else 'not there'}: expected a file of weights."
        )


# ---- dlib ------------------------------------------------------------------------------------------------------------


def read_dlib(path: Path) -> Foreign:
    """dlib's face recognition network, dlib_face_recognition_resnet_model_v1.dat; `fe.load("dlib")` gives the same.

    Returns:
      A `DlibResNet` for 150 px, whose embeddings have dlib's own lengths.

    Raises:
      ValueError: a damaged file, or another network.
    """
    _check_file(path)
    return Foreign(
        encoder=config.DlibResNet(unit=False),
        preprocess=PUBLISHED["dlib"],
        variables={**dlib_resnet.read_weights(path), "batch_stats": {}},
        notes=(),
    )


# ---- trees -----------------------------------------------------------------------------------------------------------


def _finite(array: np.ndarray) -> bool:
    """Whether all values are finite, as float32 too."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(array.astype(np.float32)).all())


def _put(variables: dict[str, Any], place: str, array: np.ndarray) -> None:
    """Puts a float32 array at a place such as params/stem_conv/kernel."""
    *branches, leaf = place.split("/")
    node = variables
    for branch in branches:
        node = node.setdefault(branch, {})
    node[leaf] = np.ascontiguousarray(array, np.float32)


def _shapes(encoder: nn.Module, size: int) -> dict[str, tuple[int, ...]]:
    """Place → shape of every array of an encoder for photos of size × size pixels; nothing is computed."""
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    tree = jax.eval_shape(encoder.init, jax.random.key(0), images)
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def check_variables(encoder: nn.Module, size: int, variables: dict[str, Any]) -> None:
    """Refuses variables that are not those of an encoder.

    Args:
      encoder: the module that shall read them.
      size: side of its photos, in pixels.
      variables: {"params", "batch_stats"}.

    Raises:
      ValueError: a place that is missing or too many, another shape, or another type than float32.
    """
    expected = _shapes(encoder, size)
    found = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    for place in sorted(expected.keys() | found.keys()):
        if place not in found:
            raise ValueError(f"{place} is missing, expected shape {list(expected[place])}.")
        if place not in expected:
            raise ValueError(f"{place} was not expected: {type(encoder).__name__} has no such array.")
        if found[place].shape != expected[place] or found[place].dtype != np.float32:
            raise ValueError(
                f"{place} is {found[place].dtype} {list(found[place].shape)}, expected float32 {list(expected[place])}."
            )


# ---- ONNX ------------------------------------------------------------------------------------------------------------

# Nodes that hand their first input on, number for number.
_SILENT = ("Identity", "Dropout", "Squeeze", "Unsqueeze", "Cast")
# Nodes that exporters leave between a map's shape and the Reshape that flattens the map.
_OF_SHAPES = ("Gather", "Unsqueeze", "Squeeze", "Concat", "Slice", "Cast", "Mul", "Identity")


@dataclasses.dataclass(frozen=True, eq=False)
class _Node:
    """One operation; inputs are names, silent nodes already left out."""

    op: str
    name: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]


class _Walk:
    """An ONNX network taken apart from its input to its output, into the places of one of our trees.

    Each method reads the node that must come next after tensor `x`, and returns the name of that node's output.

    Args:
      path: the file.
      hint: ends each message: what the format reads and what to try.

    Attributes:
      input: name of the tensor that photos go into.
      variables: {"params", "batch_stats"}, float32 and as full as the walk has come.
      folded: batch norms met so far that are part of the layer before them.
    """

    def __init__(self, path: Path, hint: str) -> None:
        self._path, self._hint = path, hint
        self.variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
        self.folded = 0
        self._used: set[_Node] = set()
        self._met: set[str] = set()
        graph = self._load()
        self._stored, self._origin = self._tensors(graph)
        self._nodes, alias = self._connect(graph)
        self._readers: dict[str, list[_Node]] = {}
        for node in self._nodes:
            for name in dict.fromkeys(node.inputs):
                self._readers.setdefault(name, []).append(node)
        self.input = self._only_input(graph)
        if len(graph.output) != 1:
            names = ", ".join(repr(value.name) for value in graph.output)
            raise self.error(f"found {len(graph.output)} outputs ({names}), expected one, the embedding.")
        self._output = alias.get(graph.output[0].name, graph.output[0].name)

    def error(self, text: str) -> ValueError:
        return _Refused(f"{self._path}: {text} {self._hint}")

    # ---- reading the file

    def _load(self) -> Any:
        _check_file(self._path)
        try:
            import onnx
        except ImportError:
            raise ImportError(
                f"reading {self._path} needs the package onnx, which is not installed. Install the "
                "optional extra: pip install 'faceembed[import]', or in a checkout: pip install -e '.[import]'"
            ) from None
        try:
            # What lies in other files is not followed: the name of such a file is a stranger's.
            model = onnx.load(self._path, load_external_data=False)
        except Exception as error:  # protobuf's DecodeError is another class in each of its back ends
            size = self._path.stat().st_size
            raise self.error(
                f"not a whole ONNX file ({size:,} bytes: {error}); it is cut off or another format."
            ) from error
        if not model.graph.node:
            raise self.error("holds no network: an ONNX file without nodes, as one that is cut off may look.")
        return model.graph

    def _tensors(self, graph: Any) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Stored arrays by name, and for those that nodes derive from them the name of the stored one."""
        import onnx

        arrays: dict[str, np.ndarray] = {}
        origin: dict[str, str] = {}
        values = [(tensor.name, tensor) for tensor in graph.initializer]
        for node in graph.node:
            if node.op_type == "Constant" and node.output:
                for attribute in node.attribute:
                    value = onnx.helper.get_attribute_value(attribute)
                    values.append((node.output[0], value))
        for name, value in values:
            if not isinstance(value, onnx.TensorProto):
                arrays[name] = np.asarray(value)
                continue
            if value.data_location == onnx.TensorProto.EXTERNAL:
                raise self.error(
                    f"tensor {name!r} lies in another file, expected all in one. "
                    "Try onnx.save(onnx.load(FILE), ONE_FILE) where both are."
                )
            try:
                arrays[name] = onnx.numpy_helper.to_array(value)
            except Exception as error:  # too few bytes, a type that no array has
                raise self.error(
                    f"tensor {name!r} cannot be read ({error}), expected {list(value.dims)} numbers."
                ) from error
        for node in graph.node:
            if not node.input or not node.output or node.input[0] not in arrays:
                continue
            options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            array = arrays[node.input[0]]
            # PyTorch stores equal tensors once and hands them on, turns a matrix, and gives slopes the rank of a map.
            match node.op_type:
                case "Identity" | "Cast":
                    made = array
                case "Transpose" if sorted(options.get("perm", range(array.ndim))) == list(range(array.ndim)):
                    made = array.transpose(options.get("perm"))
                case "Unsqueeze" if array.ndim <= 1:
                    axes = options.get("axes") or np.ravel(arrays.get(node.input[-1], ()))
                    made = array.reshape(-1, *[1] * len(axes))
                case _:
                    continue
            arrays[node.output[0]] = made
            origin[node.output[0]] = origin.get(node.input[0], node.input[0])
        return arrays, origin

    def _connect(self, graph: Any) -> tuple[list[_Node], dict[str, str]]:
        """The nodes that compute with photos, connected past those that hand values on, and what stands for what."""
        import onnx

        alias: dict[str, str] = {}
        sizes: set[str] = set()
        nodes = []
        made = {name for node in graph.node for name in node.output}
        made |= {value.name for value in graph.input} | self._stored.keys()
        for number, node in enumerate(graph.node):
            op = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
            label = node.name or f"{node.op_type} {number}"
            if missing := [name for name in node.input if name and name not in made]:
                raise self.error(f"tensor {missing[0]!r} is missing: node {label!r} reads it.")
            if not node.output:
                raise self.error(f"node {label!r} ({op}) has no output.")
            if node.output[0] in self._stored:
                continue
            moving = [name for name in node.input if name and name not in self._stored]
            if op == "Shape" or (moving and op in _OF_SHAPES and all(name in sizes for name in moving)):
                sizes.add(node.output[0])
                continue
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if op in _SILENT and node.input[0] not in self._stored:
                floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
                if op == "Cast" and attributes.get("to") not in floats:
                    raise self.error(f"node {label!r} turns tensor {node.input[0]!r} into integers, expected floats.")
                alias[node.output[0]] = alias.get(node.input[0], node.input[0])
                continue
            inputs = tuple(alias.get(name, name) for name in node.input if name not in sizes)
            nodes.append(_Node(op, label, inputs, node.output[0], attributes))
        return nodes, alias

    def _only_input(self, graph: Any) -> str:
        # Files before ONNX 1.4 list stored tensors among the inputs too.
        inputs = [value for value in graph.input if value.name not in self._stored]
        if len(inputs) != 1:
            names = ", ".join(repr(value.name) for value in inputs)
            raise self.error(
                f"found {len(inputs)} inputs ({names}), expected one, the photos: another is a missing tensor."
            )
        dims = inputs[0].type.tensor_type.shape.dim
        shape = [dim.dim_value or None for dim in dims]
        if dims and (len(shape) != 4 or any(a not in (None, b) for a, b in zip(shape[1:], (3, 112, 112), strict=True))):
            raise self.error(f"tensor {inputs[0].name!r}, the photos, has shape {shape}, expected [b, 3, 112, 112].")
        return inputs[0].name

    # ---- going on

    def readers(self, x: str) -> list[_Node]:
        return self._readers.get(x, [])

    def _take(self, x: str, ops: tuple[str, ...], place: str) -> _Node:
        found = [node for node in self.readers(x) if node.op in ops]
        if len(found) != 1 or found[0] in self._used:
            there = ", ".join(f"{node.name!r} ({node.op})" for node in self.readers(x)) or "nothing"
            raise self.error(f"tensor {x!r} is read by {there}, expected one {' or '.join(ops)} for {place}.")
        self._used.add(found[0])
        self._met.update(self._origin.get(name, name) for name in found[0].inputs)
        return found[0]

    def _array(self, node: _Node, index: int, place: str) -> np.ndarray:
        name = node.inputs[index] if index < len(node.inputs) else ""
        if name not in self._stored:
            raise self.error(
                f"node {node.name!r} ({node.op}) computes its input {name!r}, expected stored numbers, {place}."
            )
        array = self._stored[name]
        if not np.issubdtype(array.dtype, np.floating):
            raise self.error(f"tensor {self._name(node, index)!r} ({place}) is {array.dtype}, expected floats.")
        if not _finite(array):
            raise self.error(
                f"tensor {self._name(node, index)!r} ({place}) holds values that are not finite in float32."
            )
        return array.astype(np.float64)

    def _name(self, node: _Node, index: int) -> str:
        return self._origin.get(node.inputs[index], node.inputs[index])

    def _misshaped(self, node: _Node, index: int, place: str, shape: tuple[int, ...], expected: Any) -> ValueError:
        return self.error(f"tensor {self._name(node, index)!r} ({place}) has shape {list(shape)}, expected {expected}.")

    def _vector(self, node: _Node, index: int, place: str, channels: int) -> np.ndarray:
        array = self._array(node, index, place)
        if array.shape != (channels,):
            raise self._misshaped(node, index, place, array.shape, [channels])
        return array

    def _attribute(self, node: _Node, place: str, name: str, default: Any, expected: Any) -> None:
        found = node.attributes.get(name, default)
        if found != expected:
            raise self.error(f"node {node.name!r} ({node.op}, {place}) has {name} {found}, expected {expected}.")

    # ---- layers

    def put(self, collection: str, place: str, array: np.ndarray) -> None:
        if not _finite(array):  # a scale, or a number that a batch norm was folded into
            raise self.error(f"what is stored for {place} is not finite in float32.")
        _put(self.variables, f"{collection}/{place}", array)

    def normalisation(self, x: str) -> tuple[str, tuple[float, float] | None]:
        """Arithmetic with single numbers in front of the network: (tensor behind it, (mean, scale) or None)."""
        slope, offset, any_found = 1.0, 0.0, False
        while len(self.readers(x)) == 1 and self.readers(x)[0].op in ("Sub", "Add", "Mul", "Div"):
            node = self._take(x, ("Sub", "Add", "Mul", "Div"), "preprocess")
            index = 1 if node.inputs[0] == x else 0
            value = self._array(node, index, "preprocess")
            if (
                value.size != 1
                or (index == 0 and node.op in ("Sub", "Div"))
                or (node.op in ("Mul", "Div") and value <= 0)
            ):
                raise self._misshaped(
                    node, index, "preprocess", value.shape, "one number that photos are subtracted by or scaled by"
                )
            number = value.item()
            match node.op:
                case "Sub":
                    offset -= number
                case "Add":
                    offset += number
                case "Mul":
                    slope, offset = slope * number, offset * number
                case "Div":
                    slope, offset = slope / number, offset / number
            x, any_found = node.output, True
        return x, (-offset / slope, 1 / slope) if any_found else None

    def kernel(
        self,
        x: str,
        place: str,
        features: int | None,
        inputs: int,
        *,
        window: int,
        strides: int = 1,
        groups: int = 1,
        padded: bool = True,
    ) -> tuple[np.ndarray, np.ndarray | None, str]:
        """A convolution: (weights [features, inputs / groups, window, window], bias or None, its output)."""
        node = self._take(x, ("Conv",), place)
        weights = self._array(node, 1, f"{place}/kernel")
        out = features or (weights.shape[0] if weights.ndim else 0)
        expected = (out, inputs // groups, window, window)
        if weights.shape != expected:
            raise self._misshaped(node, 1, f"{place}/kernel", weights.shape, list(expected))
        padding = window // 2 if padded else 0
        self._attribute(node, place, "auto_pad", b"NOTSET", b"NOTSET")
        self._attribute(node, place, "pads", [0] * 4, [padding] * 4)
        self._attribute(node, place, "strides", [1, 1], [strides] * 2)
        self._attribute(node, place, "dilations", [1, 1], [1, 1])
        self._attribute(node, place, "group", 1, groups)
        bias = self._vector(node, 2, f"{place}/bias", out) if len(node.inputs) > 2 and node.inputs[2] else None
        return weights, bias, node.output

    def convolution(self, x: str, place: str, norm: str, features: int, inputs: int, **options: Any) -> str:
        """A convolution and its batch norm, which may be folded into it."""
        weights, bias, x = self.kernel(x, place, features, inputs, **options)
        self.put("params", f"{place}/kernel", weights.transpose(2, 3, 1, 0))
        if bias is None and not any(node.op == "BatchNormalization" for node in self.readers(x)):
            # Which of both is missing cannot be known.
            raise self.error(
                f"tensor {x!r} ({place}) comes from a convolution without a bias and goes into no BatchNormalization, "
                f"expected one or the other for {norm}."
            )
        return self.norm(x, norm, features, bias)

    def norm(self, x: str, place: str, channels: int, bias: np.ndarray | None = None) -> str:
        """A batch norm of `bias` + the layer before; where there is no node, that layer holds it already."""
        x, moments = self._moments(x, place, channels, bias)
        self.put("params", f"{place}/scale", moments["scale"])
        self.put("params", f"{place}/bias", moments["bias"])
        self.put("batch_stats", f"{place}/mean", moments["mean"])
        self.put("batch_stats", f"{place}/var", moments["var"])
        return x

    def scaled_norm(self, x: str, place: str, channels: int, *, following: bool) -> tuple[str, np.ndarray]:
        """A batch norm without a scale in ours: (output, what the layer before is to be multiplied with).

        Args:
          following: the layer before has a bias, so the norm may be folded into it.
        """
        x, moments = self._moments(x, place, channels, np.zeros(channels) if following else None)
        factor = moments["scale"]
        self.put("params", f"{place}/bias", moments["bias"])
        self.put("batch_stats", f"{place}/mean", moments["mean"] * factor)
        self.put("batch_stats", f"{place}/var", moments["var"])
        return x, factor

    def _moments(self, x: str, place: str, channels: int, bias: np.ndarray | None) -> tuple[str, dict[str, np.ndarray]]:
        epsilon = layers.BATCH_NORM_EPSILON
        if bias is not None and not any(node.op == "BatchNormalization" for node in self.readers(x)):
            self.folded += 1
            var = np.full(channels, 1 - epsilon)
            return x, {"scale": np.ones(channels), "bias": bias, "mean": np.zeros(channels), "var": var}
        node = self._take(x, ("BatchNormalization",), place)
        self._attribute(node, place, "training_mode", 0, 0)
        names = enumerate(("scale", "bias", "mean", "var"), start=1)
        moments = {leaf: self._vector(node, index, f"{place}/{leaf}", channels) for index, leaf in names}
        # ε is ours from here on; what differs goes into the variance.
        theirs = node.attributes.get("epsilon", 1e-5)
        if np.min(moments["var"]) < 0 or not np.min(moments["var"]) + theirs > 0:
            raise self.error(f"tensor {self._name(node, 4)!r} ({place}/var) holds variances below 0.")
        moments["var"] = moments["var"] + (theirs - epsilon)
        if bias is not None:
            moments["mean"] = moments["mean"] - bias
        return node.output, moments

    def prelu(self, x: str, place: str, channels: int) -> str:
        node = self._take(x, ("PRelu",), place)
        slope = self._array(node, 1, f"{place}/slope")
        if slope.size == 1:  # one for all channels
            slope = np.full(channels, slope.item())
        elif slope.size != channels or sum(size != 1 for size in slope.shape) != 1 or slope.ndim == 2:
            raise self._misshaped(node, 1, f"{place}/slope", slope.shape, [channels, 1, 1])
        self.put("params", f"{place}/slope", slope.reshape(channels))
        return node.output

    def add(self, x: str, y: str, place: str) -> str:
        node = self._take(y, ("Add",), place)
        if sorted(node.inputs) != sorted((x, y)):
            raise self.error(f"node {node.name!r} (Add, {place}) adds {node.inputs}, expected tensors {x!r} and {y!r}.")
        return node.output

    def flat(self, x: str) -> str:
        """Behind a Flatten or Reshape, if there is one; the matrix behind says whether it reads all values."""
        if [node.op for node in self.readers(x)] not in (["Flatten"], ["Reshape"]):
            return x
        node = self._take(x, ("Flatten", "Reshape"), "embedding")
        if node.op == "Flatten":
            self._attribute(node, "embedding", "axis", 1, 1)
        elif len(node.inputs) > 1 and node.inputs[1] in self._stored and self._stored[node.inputs[1]].size != 2:
            sizes = self._stored[node.inputs[1]].tolist()
            raise self.error(
                f"node {node.name!r} (Reshape) gives tensor {x!r} the shape {sizes}, expected [b, values]."
            )
        return node.output

    def dense(self, x: str, place: str, inputs: int) -> tuple[np.ndarray, np.ndarray | None, str]:
        """Flattening and a matrix: (kernel [inputs, d], bias [d] or None, its output)."""
        node = self._take(self.flat(x), ("Gemm", "MatMul"), place)
        kernel = self._array(node, 1, f"{place}/kernel")
        turned = node.op == "Gemm" and node.attributes.get("transB", 0)
        if node.op == "Gemm":
            self._attribute(node, place, "transA", 0, 0)
            self._attribute(node, place, "alpha", 1.0, 1.0)
            self._attribute(node, place, "beta", 1.0, 1.0)
        if kernel.ndim != 2 or kernel.shape[1 if turned else 0] != inputs:
            raise self._misshaped(
                node, 1, f"{place}/kernel", kernel.shape, f"[d, {inputs}]" if turned else f"[{inputs}, d]"
            )
        kernel = kernel.T if turned else kernel
        if node.op == "Gemm":
            with_bias = len(node.inputs) > 2 and node.inputs[2]
            return kernel, self._vector(node, 2, f"{place}/bias", kernel.shape[1]) if with_bias else None, node.output
        x = node.output
        if [after.op for after in self.readers(x)] != ["Add"]:
            return kernel, None, x
        node = self._take(x, ("Add",), place)
        index = 1 if node.inputs[0] == x else 0
        return kernel, self._vector(node, index, f"{place}/bias", kernel.shape[1]), node.output

    def finish(self, x: str) -> None:
        """Checks that x is the output, or the output is x of unit length, and that the file holds nothing else."""
        if x != self._output:
            x = self._unit_length(x)
        if x != self._output:
            there = ", ".join(f"{node.name!r} ({node.op})" for node in self.readers(x)) or "nothing"
            raise self.error(f"tensor {x!r}, the embedding, goes into {there}, expected the output {self._output!r}.")
        if left := [node for node in self._nodes if node not in self._used]:
            raise self.error(
                f"node {left[0].name!r} ({left[0].op}), which reads {', '.join(map(repr, left[0].inputs))}, was not "
                f"expected, nor were {len(left) - 1} others."
            )
        floats = [name for name, array in self._stored.items() if np.issubdtype(array.dtype, np.floating)]
        if extra := [name for name in floats if name not in self._met and name not in self._origin]:
            others = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            shape = list(self._stored[extra[0]].shape)
            raise self.error(
                f"tensor {extra[0]!r} of shape {shape}{others} was not expected: the network does not read it."
            )

    def _unit_length(self, x: str) -> str:
        """Behind a division by the Euclidean norm, which our encoders end with as well."""
        if [node.op for node in self.readers(x)] == ["LpNormalization"]:
            node = self._take(x, ("LpNormalization",), "unit length")
            self._attribute(node, "unit length", "p", 2, 2)
            self._attribute(node, "unit length", "axis", node.attributes.get("axis", -1) % 2, 1)
            return node.output
        if sorted(node.op for node in self.readers(x)) != ["Div", "ReduceL2"]:
            return x
        norm = self._take(x, ("ReduceL2",), "unit length")
        axes = norm.attributes.get("axes")
        if axes is None and len(norm.inputs) > 1 and norm.inputs[1] in self._stored:
            axes = self._stored[norm.inputs[1]].tolist()
        if axes not in ([1], [-1]):
            raise self.error(f"node {norm.name!r} (ReduceL2) goes over axes {axes}, expected [1].")
        length = norm.output
        while [node.op for node in self.readers(length)] in (
            ["Clip"],
            ["Max"],
            ["Expand"],
        ):  # keeps it from 0, repeats it
            length = self._take(length, ("Clip", "Max", "Expand"), "unit length").output
        node = self._take(x, ("Div",), "unit length")
        if node.inputs != (x, length):
            raise self.error(
                f"node {node.name!r} (Div) divides {node.inputs}, expected {x!r} by its length {length!r}."
            )
        return node.output


FORMATS: dict[str, Callable[[Path], Foreign]] = {
    "insightface-onnx": read_insightface_onnx,
    "facenet-pytorch": read_facenet_pytorch,
    "mobilefacenet-onnx": read_mobilefacenet_onnx,
    "dlib": read_dlib,
}
"""Name → how a file of that format is read."""

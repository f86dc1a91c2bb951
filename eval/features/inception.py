"""Inception v3 (Szegedy et al. 2015) as in the Frechet Inception distance.

The distance is defined by TensorFlow's graph of 5 December 2015. It differs from the paper and from
torchvision's network: average pools do not count the padding, the last block has a max pool, and there are
1008 outputs.

For inference only: normalisation is folded into the convolutions, the 1 x 1 convolutions of one input are one
product, and averages are taken after a 1 x 1 convolution instead of before it, where channels are fewer. The
result is the same, since all of this is linear: the ReLU comes after.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.spec import lookup
from eval.features.extractor import Extractor, Identity
from eval.features.inception_weights import NORMALISATION, check_state, folded, random_state, read_weights
from eval.features.protocols import PROTOCOLS, Protocol
from eval.features.resize import RESIZES, resized
from eval.features.weights import sha256_of_tensors

CLASSES = 1008
SPATIAL = 7  # channels of 17 x 17 places in sFID's features


class Convolution(nn.Conv2d):
    """A convolution with folded normalisation, and its ReLU."""

    def __init__(
        self, width: int, out: int, kernel: tuple[int, int] = (1, 1), stride: int = 1, pad: bool = True
    ) -> None:
        padding = (kernel[0] // 2, kernel[1] // 2) if pad else 0
        super().__init__(width, out, kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x), inplace=True)


class Heads(nn.Module):
    """The 1 x 1 convolutions of a block's input, by their published names, as one product, before a ReLU."""

    def __init__(self, width: int, **widths: int) -> None:
        super().__init__()
        self.product = nn.Conv2d(width, sum(widths.values()), 1)
        self.widths = widths

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.relu(head) for head in self.split(x))

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.product(x).split(list(self.widths.values()), 1)

    def rows(self, x: Tensor, count: int) -> Tensor:
        """The first channels of the product, without ReLU and average."""
        assert self.product.bias is not None
        return F.conv2d(x, self.product.weight[:count], self.product.bias[:count])


class PooledHeads(Heads):
    """The same; the last one is averaged over 3 x 3 places before its ReLU."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        *heads, pooled = self.split(x)
        pooled = F.avg_pool2d(pooled, 3, stride=1, padding=1, count_include_pad=False)
        return *(F.relu(head) for head in heads), F.relu(pooled, inplace=True)


class InceptionA(nn.Module):
    """Figure 5: 35 x 35 places."""

    def __init__(self, width: int, pooled: int) -> None:
        super().__init__()
        self.heads = PooledHeads(width, branch1x1=64, branch5x5_1=48, branch3x3dbl_1=64, branch_pool=pooled)
        self.branch5x5_2 = Convolution(48, 64, (5, 5))
        self.branch3x3dbl_2 = Convolution(64, 96, (3, 3))
        self.branch3x3dbl_3 = Convolution(96, 96, (3, 3))

    def forward(self, x: Tensor) -> Tensor:
        one, five, three, pooled = self.heads(x)
        return torch.cat(
            [one, self.branch5x5_2(five), self.branch3x3dbl_3(self.branch3x3dbl_2(three)), pooled], 1
        )


class InceptionB(nn.Module):
    """Figure 10: from 35 x 35 to 17 x 17 places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(width, 384, (3, 3), stride=2, pad=False)
        self.branch3x3dbl_1 = Convolution(width, 64)
        self.branch3x3dbl_2 = Convolution(64, 96, (3, 3))
        self.branch3x3dbl_3 = Convolution(96, 96, (3, 3), stride=2, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, stride=2)], 1)


class InceptionC(nn.Module):
    """Figure 6, with n = 7: 17 x 17 places."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.heads = PooledHeads(
            width, branch1x1=192, branch7x7_1=inner, branch7x7dbl_1=inner, branch_pool=192
        )
        self.branch7x7_2 = Convolution(inner, inner, (1, 7))
        self.branch7x7_3 = Convolution(inner, 192, (7, 1))
        self.branch7x7dbl_2 = Convolution(inner, inner, (7, 1))
        self.branch7x7dbl_3 = Convolution(inner, inner, (1, 7))
        self.branch7x7dbl_4 = Convolution(inner, inner, (7, 1))
        self.branch7x7dbl_5 = Convolution(inner, 192, (1, 7))

    def forward(self, x: Tensor) -> Tensor:
        one, seven, double, pooled = self.heads(x)
        seven = self.branch7x7_3(self.branch7x7_2(seven))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(double))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([one, seven, double, pooled], 1)

    def first(self, x: Tensor, channels: int) -> Tensor:
        """The first channels of the output, and nothing else."""
        return F.relu(self.heads.rows(x, channels))


class InceptionD(nn.Module):
    """From 17 x 17 to 8 x 8 places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = Heads(width, branch3x3_1=192, branch7x7x3_1=192)
        self.branch3x3_2 = Convolution(192, 320, (3, 3), stride=2, pad=False)
        self.branch7x7x3_2 = Convolution(192, 192, (1, 7))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1))
        self.branch7x7x3_4 = Convolution(192, 192, (3, 3), stride=2, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        three, seven = self.heads(x)
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(seven)))
        return torch.cat([self.branch3x3_2(three), seven, F.max_pool2d(x, 3, stride=2)], 1)


class _Fans(nn.Module):
    """What the blocks of figure 7 share: two branches that fan out into 1 x 3 and 3 x 1."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_2a = Convolution(384, 384, (1, 3))
        self.branch3x3_2b = Convolution(384, 384, (3, 1))
        self.branch3x3dbl_2 = Convolution(448, 384, (3, 3))
        self.branch3x3dbl_3a = Convolution(384, 384, (1, 3))
        self.branch3x3dbl_3b = Convolution(384, 384, (3, 1))

    def joined(self, one: Tensor, three: Tensor, double: Tensor, pooled: Tensor) -> Tensor:
        double = self.branch3x3dbl_2(double)
        fans = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        fans += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([one, *fans, pooled], 1)


class InceptionE(_Fans):
    """Figure 7: 8 x 8 places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = PooledHeads(width, branch1x1=320, branch3x3_1=384, branch3x3dbl_1=448, branch_pool=192)

    def forward(self, x: Tensor) -> Tensor:
        one, three, double, pooled = self.heads(x)
        return self.joined(one, three, double, pooled)


class InceptionEMax(_Fans):
    """The last block, with a max pool. It is not linear, so its convolution stays behind it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = Heads(width, branch1x1=320, branch3x3_1=384, branch3x3dbl_1=448)
        self.branch_pool = Convolution(width, 192)

    def forward(self, x: Tensor) -> Tensor:
        one, three, double = self.heads(x)
        return self.joined(one, three, double, self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1)))


class InceptionV3(nn.Module):
    """(B, 3, 299, 299), normalised -> float32 features by name, as in `Inception.widths`."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, (3, 3), stride=2, pad=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, (3, 3), pad=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Convolution(64, 80)
        self.Conv2d_4a_3x3 = Convolution(80, 192, (3, 3), pad=False)
        self.Mixed_5b = InceptionA(192, pooled=32)
        self.Mixed_5c = InceptionA(256, pooled=64)
        self.Mixed_5d = InceptionA(288, pooled=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, inner=128)
        self.Mixed_6c = InceptionC(768, inner=160)
        self.Mixed_6d = InceptionC(768, inner=160)
        self.Mixed_6e = InceptionC(768, inner=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280)
        self.Mixed_7c = InceptionEMax(2048)
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, x: Tensor, outputs: Collection[str]) -> dict[str, Tensor]:
        """Only as deep as the outputs need."""
        features = {}
        x = self.middle(x)
        if "spatial" in outputs:
            features["spatial"] = self.Mixed_6d.first(x, SPATIAL).permute(0, 2, 3, 1).flatten(1).float()
        if features.keys() == set(outputs):
            return features
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        pool = self.Mixed_7c(self.Mixed_7b(x)).float().mean((2, 3))
        features["pool"] = pool
        if "logits" in outputs or "logits_unbiased" in outputs:
            unbiased = F.linear(pool, self.fc.weight)
            features |= {"logits_unbiased": unbiased, "logits": unbiased + self.fc.bias}
        return {name: features[name] for name in outputs}

    def middle(self, x: Tensor) -> Tensor:
        """The input of Mixed_6d, (B, 768, 17, 17)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        return self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))


class Inception(Extractor):
    """The FID network under a protocol.

    pool             2048 means over the last places: Frechet and kernel distance, precision and recall
    spatial          of sFID (Nash et al. 2021, as in Dhariwal and Nichol 2021): the first 7 channels of
                     `mixed_6/conv` after the ReLU, at 17 x 17 places, in TensorFlow's order
    logits           of 1008 classes; logits_unbiased, for Inception Scores, lacks the bias

    dtype  of the convolutions; the last pool and the logits are float32
    """

    widths: Mapping[str, int] = MappingProxyType(
        {"pool": 2048, "spatial": SPATIAL * 17 * 17, "logits": CLASSES, "logits_unbiased": CLASSES}
    )

    def __init__(
        self, network: InceptionV3, protocol: Protocol, identity: Identity, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.network = network.to(dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        self.network.fc.float()
        self.protocol, self.identity, self.dtype = protocol, identity, dtype

    def prepare(self, pictures: Sequence[Tensor]) -> Tensor:
        """Resized as in the protocol: float32 (B, 3, 299, 299) in [0, 255]."""
        return resized(pictures, RESIZES[self.protocol.resize])

    @torch.inference_mode()
    def features(self, x: Tensor, outputs: Collection[str]) -> dict[str, Tensor]:
        """See `Extractor`. float32 is not TF32, on a GPU too."""
        x = (x - self.protocol.centre) / self.protocol.scale
        benchmark = torch.backends.cudnn.benchmark
        with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, allow_tf32=False):
            return self.network(x.to(self.dtype, memory_format=torch.channels_last), outputs)


def load_inception(
    path: str | Path, protocol: str = "clean", sha256: str | None = None, dtype: torch.dtype = torch.float32
) -> Inception:
    """From a local file: one of inception_weights.PUBLISHED, or one of these tensors that hashes to `sha256`.

    ValueError for a file of another hash, missing or unknown tensors, or an unknown protocol; OSError without
    a file.
    """
    found = lookup("protocol", protocol, PROTOCOLS)
    state, digest = read_weights(path, sha256)
    return Inception(assembled(state, str(path)), found, _identity(found, digest, dtype), dtype)


def random_inception(protocol: str = "clean", seed: int = 0, dtype: torch.dtype = torch.float32) -> Inception:
    """With random weights, for trials: distances mean nothing, and the identity says so."""
    found = lookup("protocol", protocol, PROTOCOLS)
    state = random_state(published_shapes(), seed)
    identity = _identity(found, sha256_of_tensors(state), dtype, random=True)
    return Inception(assembled(state, "random weights"), found, identity, dtype)


def assembled(state: Mapping[str, Tensor], path: str) -> InceptionV3:
    """The network of the plain file's tensors. ValueError for missing or unknown ones."""
    network = InceptionV3()
    check_state(state, published_shapes(), path)
    for convolution, parts in _convolutions(network):
        weights, biases = zip(*(folded(state, part) for part in parts), strict=True)
        convolution.load_state_dict({"weight": torch.cat(weights), "bias": torch.cat(biases)})
    network.fc.load_state_dict({"weight": state["fc.weight"], "bias": state["fc.bias"]})
    return network


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the plain file's tensors, without those for training."""
    shapes: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"):
        network = InceptionV3()
    for convolution, parts in _convolutions(network):
        for part, width in parts.items():
            shapes[f"{part}.conv.weight"] = (width, *convolution.weight.shape[1:])
            shapes |= {f"{part}.bn.{name}": (width,) for name in NORMALISATION}
    return shapes | {"fc.weight": (CLASSES, 2048), "fc.bias": (CLASSES,)}


def _convolutions(network: InceptionV3) -> list[tuple[nn.Conv2d, dict[str, int]]]:
    """Every convolution, and the widths of the published ones that it consists of, in order, by name."""
    found: list[tuple[nn.Conv2d, dict[str, int]]] = []
    for name, module in network.named_modules():
        if isinstance(module, Convolution):
            found.append((module, {name: module.out_channels}))
        elif isinstance(module, Heads):
            block = name.rpartition(".")[0]
            widths = {f"{block}.{part}": width for part, width in module.widths.items()}
            found.append((module.product, widths))
    return found


def _identity(protocol: Protocol, weights: str, dtype: torch.dtype, random: bool = False) -> Identity:
    exact = "" if dtype == torch.float32 else f" in {str(dtype).removeprefix('torch.')}"
    return Identity(f"inception-2015-12-05{exact}", weights, protocol.prepared, random)

"""The FID network against torch-fidelity's and pytorch-fid's, on the same random weights and real pictures;
and its files."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.features.inception import Inception, assembled, load_inception, published_shapes, random_inception
from eval.features.inception_weights import FROM_TORCHSCRIPT, PUBLISHED, from_torchscript, random_state
from eval.features.protocols import PROTOCOLS, Splits
from eval.metrics.frechet import frechet_distance
from eval.metrics.moments import Moments
from models.files.text import sha256_of_file
from tests.eval.photographs import photographs
from tests.peers import pytorch_fid, sklearn, torch_fidelity

NAMES = ("pool", "logits_unbiased")


def crops() -> list[Tensor]:
    """Twelve of three photographs, of three sizes, uint8 (3, H, W)."""
    corners = ((0, 290), (40, 256), (100, 64), (30, 256))
    return [whole[:, i : i + side, i : i + side] for whole in photographs().values() for i, side in corners]


def digits() -> list[Tensor]:
    """Twelve digits of 8 x 8 pixels, each of which is 8 x 8 pixels here."""
    grey = torch.from_numpy(sklearn.datasets.load_digits().images[:12] * 15).byte()
    return list(grey[:, None].repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1))


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights by published names, normalisation and all."""
    return random_state(published_shapes(), seed=0)


@pytest.fixture(scope="module")
def file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain file of them."""
    path = tmp_path_factory.mktemp("weights") / "plain.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def load(file: Path) -> Callable[..., Inception]:
    """Ours from that file, under a protocol."""
    return lambda protocol, **options: load_inception(file, protocol, sha256=sha256_of_file(file), **options)


@pytest.fixture(scope="module")
def ours(load: Callable[..., Inception]) -> Inception:
    """Ours as torch-fidelity has it."""
    return load("torch_fidelity")


@pytest.fixture(scope="module")
def fidelity(file: Path) -> Callable[[list[Tensor]], list[Tensor]]:
    """torch-fidelity's pool and logits without bias, of pictures one by one."""
    network = torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased", "logits"], feature_extractor_weights_path=str(file)
    )

    @torch.inference_mode()
    def features(pictures: list[Tensor]) -> list[Tensor]:
        return [
            torch.cat(rows) for rows in zip(*(network(picture[None]) for picture in pictures), strict=True)
        ]

    return features


@pytest.fixture(scope="module")
def real(
    ours: Inception, fidelity: Callable[[list[Tensor]], list[Tensor]]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Features of the photographs, ours and torch-fidelity's."""
    return ours(crops(), ours.widths), fidelity(crops())


def test_as_torch_fidelity(ours: Inception, real: tuple[dict[str, Tensor], list[Tensor]]) -> None:
    """Means, and logits with and without bias, within 1e-4 on features around 1; every output as wide as
    stated, float32, none constant."""
    out, expected = real
    assert {name: value.shape for name, value in out.items()} == {
        name: (12, width) for name, width in ours.widths.items()
    }
    for name, theirs in zip(("pool", "logits_unbiased", "logits"), expected, strict=True):
        assert 0.1 < theirs.abs().mean() < 10
        assert out[name].dtype == torch.float32
        assert out[name].std(0).median() > 1e-3
        torch.testing.assert_close(out[name], theirs, rtol=0, atol=1e-4)


def test_frechet_distance_is_torch_fidelitys(
    ours: Inception,
    real: tuple[dict[str, Tensor], list[Tensor]],
    fidelity: Callable[[list[Tensor]], list[Tensor]],
) -> None:
    """Between photographs and digits, from our features and from theirs, within 1e-6 of it."""
    photos, theirs = real
    distance = frechet_distance(Moments.of(photos["pool"]), Moments.of(ours(digits(), ["pool"])["pool"]))
    expected = frechet_distance(Moments.of(theirs[0]), Moments.of(fidelity(digits())[0]))
    assert distance == pytest.approx(expected, rel=1e-6)
    assert distance > 1


@torch.inference_mode()
def test_as_pytorch_fid(
    load: Callable[..., Inception], state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under legacy_pytorch, its means of pictures in [0, 1], resized and normalised by itself, within
    1e-4."""
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda url, progress: state)
    network = pytorch_fid.inception.InceptionV3([3]).eval()
    pictures = crops()[:3] + digits()[:1]
    expected = torch.cat([network(picture[None].float() / 255)[0].flatten(1) for picture in pictures])
    torch.testing.assert_close(
        load("legacy_pytorch")(pictures, ["pool"])["pool"], expected, rtol=0, atol=1e-4
    )


@torch.inference_mode()
def test_spatial_feature_is_the_first_channels_of_mixed_6d(
    file: Path, ours: Inception, real: tuple[dict[str, Tensor], list[Tensor]]
) -> None:
    """The first 7 channels of torch-fidelity's Mixed_6d, places before channels, within 1e-4: with the rest
    of the features and alone."""
    network = torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "inception", ["768"], feature_extractor_weights_path=str(file)
    )
    seen: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, out: seen.append(out))
    picture = crops()[1]
    network(picture[None])
    expected = seen[0][0, :7].permute(1, 2, 0).flatten()
    torch.testing.assert_close(real[0]["spatial"][1], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours([picture], ["spatial"])["spatial"][0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("outputs", "runs"), [(["spatial"], False), (["pool"], True), (["logits", "spatial"], True), ([], False)]
)
def test_computes_no_more_than_asked(ours: Inception, outputs: list[str], runs: bool) -> None:
    """Exactly the outputs asked for, in their order; what lies behind sFID's feature runs only if something
    needs it."""
    ran: list[bool] = []
    handle = ours.network.Mixed_7a.register_forward_hook(lambda *_: ran.append(True))
    out = ours(crops()[2:3], outputs)
    handle.remove()
    assert list(out) == outputs
    assert bool(ran) == runs


def test_other_pictures_do_not_matter(ours: Inception, real: tuple[dict[str, Tensor], list[Tensor]]) -> None:
    """A picture's row in a batch of twelve of several sizes is its row alone, to 1e-5 of the largest
    feature."""
    for i in (2, 7):
        alone = ours(crops()[i : i + 1], ours.widths)
        for name, row in alone.items():
            assert (row[0] - real[0][name][i]).abs().max() < 1e-5 * row.abs().max()


def test_float32_is_not_tf32(ours: Inception) -> None:
    """Convolutions run without cuDNN's TF32, which would round features to three digits, and the setting is
    left as it was."""
    during: list[bool] = []
    handle = ours.network.Mixed_6a.register_forward_hook(
        lambda *_: during.append(torch.backends.cudnn.allow_tf32)
    )
    before = torch.backends.cudnn.allow_tf32
    ours(crops()[2:3], ["spatial"])
    handle.remove()
    assert during == [False]
    assert torch.backends.cudnn.allow_tf32 == before


def test_bfloat16_is_near(
    load: Callable[..., Inception], real: tuple[dict[str, Tensor], list[Tensor]]
) -> None:
    """Features come as float32, other than float32's, and within 3 % of them, root mean square; and the
    identity says how."""
    network = load("torch_fidelity", dtype=torch.bfloat16)
    out, exact = network(crops()[2:4], ["pool", "spatial"]), real[0]
    assert network.identity.network == "inception-2015-12-05 in bfloat16"
    for name, value in out.items():
        error = (value - exact[name][2:4]).square().mean().sqrt() / exact[name][2:4].square().mean().sqrt()
        assert value.dtype == torch.float32
        assert 1e-4 < error < 0.03


def test_identities_say_what_numbers_depend_on(load: Callable[..., Inception], file: Path) -> None:
    """The file's hash, how pictures were prepared, and that random weights are random; another seed or
    protocol is another identity."""
    identity = load("clean").identity
    assert identity.weights == hashlib.sha256(file.read_bytes()).hexdigest()
    assert identity.prepared == (
        "8-bit RGB resized to 299 x 299, bicubic as PIL does it, cut off at 0 and 255, antialiased, to "
        "float32; (x - 128) / 128"
    )
    assert not identity.random
    first, again, other = (random_inception("adm", seed).identity for seed in (0, 0, 1))
    assert first.random
    assert first == again != other
    prepared = {protocol.name: protocol.prepared for protocol in PROTOCOLS.values()}
    assert prepared["adm"] == prepared["torch_fidelity"]
    assert len(set(prepared.values())) == 3


def test_protocols_split_the_inception_score_as_their_tools_do() -> None:
    """torch-fidelity's ten parts after its own shuffle; ADM's five thousands in order."""
    assert (
        PROTOCOLS["torch_fidelity"].splits == PROTOCOLS["clean"].splits == Splits(count=10, shuffle_seed=2020)
    )
    assert PROTOCOLS["adm"].splits == Splits(size=5000)
    assert all(name == protocol.name for name, protocol in PROTOCOLS.items())


# The archive, as its scopes compute: what is behind a name is seen by what the network makes of it.


class Layer(nn.Module):
    """A convolution of the archive: weight, beta, mean and var, and no scale."""

    beta: Tensor
    mean: Tensor
    var: Tensor

    def __init__(
        self, width: int, out: int, kernel: tuple[int, int] = (1, 1), stride: int = 1, pad: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, width, *kernel))
        self.register_buffer("beta", torch.empty(out))
        self.register_buffer("mean", torch.empty(out))
        self.register_buffer("var", torch.empty(out))
        self.stride = stride
        self.padding = (kernel[0] // 2, kernel[1] // 2) if pad else (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, stride=self.stride, padding=self.padding)
        return F.relu(F.batch_norm(x, self.mean, self.var, None, self.beta, eps=1e-3))


def tower(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def average() -> nn.Module:
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)


class Scope(nn.Module):
    """A block whose branches are its children, side by side."""

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
        out: list[Tensor] = []
        for branch in self.children():
            out.append(branch(x))
        return torch.cat(out, 1)


class ScopeE(nn.Module):
    """The block whose branches fan out: its scopes lie side by side."""

    def __init__(self, width: int, pool: nn.Module) -> None:
        super().__init__()
        self.conv = Layer(width, 320)
        self.tower_conv = Layer(width, 384)
        self.tower_mixed_conv = Layer(384, 384, (1, 3))
        self.tower_mixed_conv_1 = Layer(384, 384, (3, 1))
        self.tower_1_conv = Layer(width, 448)
        self.tower_1_conv_1 = Layer(448, 384, (3, 3))
        self.tower_1_mixed_conv = Layer(384, 384, (1, 3))
        self.tower_1_mixed_conv_1 = Layer(384, 384, (3, 1))
        self.tower_2_pool = pool
        self.tower_2_conv = Layer(width, 192)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.tower_conv(x), self.tower_1_conv_1(self.tower_1_conv(x))
        fans = [
            self.tower_mixed_conv(a),
            self.tower_mixed_conv_1(a),
            self.tower_1_mixed_conv(b),
            self.tower_1_mixed_conv_1(b),
        ]
        return torch.cat([self.conv(x), *fans, self.tower_2_conv(self.tower_2_pool(x))], 1)


def scope_a(width: int, pooled: int) -> Scope:
    return Scope(
        conv=Layer(width, 64),
        tower=tower(conv=Layer(width, 48), conv_1=Layer(48, 64, (5, 5))),
        tower_1=tower(conv=Layer(width, 64), conv_1=Layer(64, 96, (3, 3)), conv_2=Layer(96, 96, (3, 3))),
        tower_2=tower(pool=average(), conv=Layer(width, pooled)),
    )


def scope_c(n: int) -> Scope:
    flat, tall = (1, 7), (7, 1)
    double = {
        "conv_1": Layer(n, n, tall),
        "conv_2": Layer(n, n, flat),
        "conv_3": Layer(n, n, tall),
        "conv_4": Layer(n, 192, flat),
    }
    return Scope(
        conv=Layer(768, 192),
        tower=tower(conv=Layer(768, n), conv_1=Layer(n, n, flat), conv_2=Layer(n, 192, tall)),
        tower_1=tower(conv=Layer(768, n), **double),
        tower_2=tower(pool=average(), conv=Layer(768, 192)),
    )


class Archive(nn.Module):
    """The whole, from normalised pictures to the 2048 means."""

    def __init__(self) -> None:
        super().__init__()
        mixed_3 = Scope(
            conv=Layer(288, 384, (3, 3), 2, False),
            tower=tower(
                conv=Layer(288, 64), conv_1=Layer(64, 96, (3, 3)), conv_2=Layer(96, 96, (3, 3), 2, False)
            ),
            pool=nn.MaxPool2d(3, 2),
        )
        seven = {
            "conv_1": Layer(192, 192, (1, 7)),
            "conv_2": Layer(192, 192, (7, 1)),
            "conv_3": Layer(192, 192, (3, 3), 2, False),
        }
        mixed_8 = Scope(
            tower=tower(conv=Layer(768, 192), conv_1=Layer(192, 320, (3, 3), 2, False)),
            tower_1=tower(conv=Layer(768, 192), **seven),
            pool=nn.MaxPool2d(3, 2),
        )
        self.layers = tower(
            conv=Layer(3, 32, (3, 3), 2, False),
            conv_1=Layer(32, 32, (3, 3), 1, False),
            conv_2=Layer(32, 64, (3, 3)),
            pool0=nn.MaxPool2d(3, 2),
            conv_3=Layer(64, 80),
            conv_4=Layer(80, 192, (3, 3), 1, False),
            pool1=nn.MaxPool2d(3, 2),
            mixed=scope_a(192, 32),
            mixed_1=scope_a(256, 64),
            mixed_2=scope_a(288, 64),
            mixed_3=mixed_3,
            mixed_4=scope_c(128),
            mixed_5=scope_c(160),
            mixed_6=scope_c(160),
            mixed_7=scope_c(192),
            mixed_8=mixed_8,
            mixed_9=ScopeE(1280, average()),
            mixed_10=ScopeE(2048, nn.MaxPool2d(3, 1, 1)),
            pool2=nn.AvgPool2d(8, 8),
        )
        self.output = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.fixture(scope="module")
def archive() -> Archive:
    """With random weights."""
    with torch.device("meta"):
        network = Archive()
    network = network.to_empty(device="cpu").eval()
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    drawn = random_state(
        {key.replace(".var", ".running_var"): shape for key, shape in shapes.items()}, seed=1
    )
    network.load_state_dict({key.replace(".running_var", ".var"): value for key, value in drawn.items()})
    return network


@torch.inference_mode()
def test_reads_the_torchscript_archive(archive: Archive, tmp_path: Path) -> None:
    """A network with the archive's scopes, saved as TorchScript: its own means, within 1e-4, and its last
    layer."""
    path = tmp_path / "archive.pt"
    torch.jit.save(torch.jit.script(_tensors_of(archive)), path)
    inception = load_inception(path, "clean", sha256=sha256_of_file(path))
    x = 255 * torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(0))
    out = inception.features(x, NAMES)
    expected = archive((x - 128) / 128).flatten(1)
    torch.testing.assert_close(out["pool"], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(out["logits_unbiased"], expected @ archive.output.weight.T, rtol=0, atol=1e-4)


def _tensors_of(archive: nn.Module) -> nn.Module:
    """The same tree of tensors, with nothing to compute, which TorchScript takes as it is."""
    plain = nn.Module()
    for name, child in archive.named_children():
        plain.add_module(name, _tensors_of(child))
    for name, parameter in archive.named_parameters(recurse=False):
        plain.register_parameter(name, parameter)
    for name, buffer in archive.named_buffers(recurse=False):
        plain.register_buffer(name, buffer)
    return plain


def test_every_key_of_the_archive_is_named(archive: Archive) -> None:
    """The table has the archive's keys and no others, and leads to every published name once; one too many or
    too few is named."""
    state = archive.state_dict()
    assert state.keys() == FROM_TORCHSCRIPT.keys()
    shapes = {key: tuple(value.shape) for key, value in from_torchscript(state).items()}
    assert shapes == published_shapes()
    with pytest.raises(
        ValueError, match=r"has 'layers.mixed_11.conv.weight', which the FID network does not have"
    ):
        from_torchscript({**state, "layers.mixed_11.conv.weight": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"lacks 'layers.mixed.tower_1.conv_2.var', which the FID network needs"
    ):
        from_torchscript(
            {key: value for key, value in state.items() if key != "layers.mixed.tower_1.conv_2.var"}
        )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "AuxLogits.fc.weight",
            torch.zeros(1),
            "x has 'AuxLogits.fc.weight', which the FID network does not have",
        ),
        (
            "Mixed_6a.branch3x3.bn.bias",
            None,
            "x lacks 'Mixed_6a.branch3x3.bn.bias', which the FID network needs",
        ),
        (
            "fc.weight",
            torch.zeros(1000, 2048),
            r"x: fc.weight must have shape \(1008, 2048\), not \(1000, 2048\)",
        ),
    ],
)
def test_tensors_of_another_network_are_refused(
    state: dict[str, Tensor], key: str, value: Tensor | None, message: str
) -> None:
    """The first tensor too many, too few or of another shape is named; counters of training are not
    minded."""
    changed = {**state, "Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(3)} | (
        {} if value is None else {key: value}
    )
    if value is None:
        del changed[key]
    with pytest.raises(ValueError, match=message):
        assembled(changed, "x")


def test_only_published_files_unless_asked(file: Path, tmp_path: Path) -> None:
    """A file of another hash, a protocol that there is not, an output that there is not, and no file: each
    says so."""
    with pytest.raises(
        ValueError,
        match=r"is not one of pt_inception-2015-12-05-6726825d.pth, inception-2015-12-05.pt: give sha256=",
    ):
        load_inception(file)
    with pytest.raises(ValueError, match="is not what was asked for"):
        load_inception(file, sha256=PUBLISHED[0].sha256)
    with pytest.raises(ValueError, match="no protocol named 'cleen'; did you mean 'clean'"):
        load_inception(file, "cleen")
    with pytest.raises(OSError, match="nothing"):
        load_inception(tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match="gives pool, spatial, logits, logits_unbiased, not 'features'"):
        random_inception()(crops()[:1], ["features"])

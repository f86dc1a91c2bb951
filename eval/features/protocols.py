"""How published numbers were computed: one protocol per tool."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Splits:
    """How an Inception Score is averaged over parts of the samples (Salimans et al. 2016, section 4).

    count         number of nearly equal parts; None: parts of `size`, the last one smaller
    size          of a part; None: `count` parts
    shuffle_seed  of numpy.random.RandomState, which shuffles the samples first; None: in their order
    """

    count: int | None = None
    size: int | None = None
    shuffle_seed: int | None = None


@dataclass(frozen=True)
class Protocol:
    """How one tool computes what Inception's features are for, besides the weights.

    Pictures have 8 bits; they are resized to 299 x 299, and not rounded again. Precision and recall are of
    Inception's pool, as in ADM's tables; torch-fidelity's own use VGG-16, as Kynkaanniemi et al. did, and
    differ.

    resize         a name in eval/features/resize.py: RESIZES
    kernel         its filter, in words
    antialias      whether the filter widens when pictures shrink
    centre, scale  the network sees (x - centre) / scale
    splits         of the Inception Score, of all 1008 logits without the bias
    """

    name: str
    resize: str
    kernel: str
    antialias: bool
    centre: float
    scale: float
    citation: str
    splits: Splits = Splits(count=10, shuffle_seed=2020)

    def __str__(self) -> str:
        return f"{self.prepared} ({self.citation})"

    @property
    def prepared(self) -> str:
        """How pictures become the network's input, for an Identity."""
        smoothed = "antialiased" if self.antialias else "not antialiased"
        size = f"299 x 299, {self.kernel}, {smoothed}, to float32"
        return f"8-bit RGB resized to {size}; (x - {self.centre:g}) / {self.scale:g}"


USUAL_N = (
    50_000  # samples of Frechet distances in papers, since Heusel et al. 2017; others cannot be compared
)

# The reference is usually the training set at the resolution of the samples.
_CLEAN = Protocol(
    "clean", resize="clean", kernel="bicubic as PIL does it, cut off at 0 and 255", antialias=True,
    centre=128, scale=128,
    citation="Parmar et al. 2022, On Aliased Resizing and Surprising Subtleties in GAN Evaluation",
)  # fmt: skip
# The reference may also be the validation set. The range [-1, 1] is a grey level off TensorFlow's.
_LEGACY_PYTORCH = Protocol(
    "legacy_pytorch", resize="legacy_pytorch", kernel="bilinear with half-pixel centres", antialias=False,
    centre=127.5, scale=127.5,
    citation="Seitzer 2020, pytorch-fid; the distance is Heusel et al. 2017's",
)  # fmt: skip
_TORCH_FIDELITY = Protocol(
    "torch_fidelity", resize="tensorflow1", kernel="bilinear of TensorFlow 1, corners at the origin",
    antialias=False, centre=128, scale=128,
    citation="Obukhov et al. 2020, torch-fidelity; the distance is Heusel et al. 2017's",
)  # fmt: skip
# The reference is the published batch of the resolution: moments of ImageNet's training set, and 10,000
# pictures for precision and recall.
_ADM = replace(
    _TORCH_FIDELITY, name="adm", splits=Splits(size=5000),
    citation="Dhariwal and Nichol 2021, Diffusion Models Beat GANs on Image Synthesis",
)  # fmt: skip
PROTOCOLS = {protocol.name: protocol for protocol in (_CLEAN, _LEGACY_PYTORCH, _TORCH_FIDELITY, _ADM)}

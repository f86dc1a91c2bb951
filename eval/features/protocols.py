"""How the numbers that papers print were made: one entry per tool whose tables are quoted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Splits:
    """How an Inception Score is averaged over parts of the samples (Salimans et al. 2016, section 4).

    count         into how many nearly equal parts; None where `size` says how large each is, the last one
                  smaller
    size          of a part; None where there are `count` of them
    shuffle_seed  numpy.random.RandomState(shuffle_seed) shuffles the samples first; None leaves them in their
                  order
    """

    count: int | None = None
    size: int | None = None
    shuffle_seed: int | None = None


@dataclass(frozen=True)
class Protocol:
    """What Frechet distance, kernel distance, Inception Score, precision and recall of one tool mean, besides
    the network's weights.

    Precision and recall are of Inception's pool in all of them, as in ADM's tables; torch-fidelity's own
    default for these two is VGG-16, as it was Kynkaanniemi et al.'s, so that its numbers are others.

    Pictures have 8 bits when they enter, whatever a model gave; then they are resized to 299 x 299, and not
    rounded again.

    resize      how: a name in eval/features/resize.py: RESIZES
    kernel      its filter, in words
    antialias   whether the filter widens where pictures shrink
    dtype       of its result, in [0, 255]
    centre, scale  the network sees (x - centre) / scale
    splits      of the Inception Score, which all of them take of the logits without the bias, over all 1008
                outputs
    usual_n, usual_reference  how many samples, and against what, papers compute the Frechet distance by this
                              protocol
    citation    where it is from
    note        what a reader may want to know besides
    """

    name: str
    resize: str
    kernel: str
    antialias: bool
    centre: float
    scale: float
    usual_n: int
    usual_reference: str
    citation: str
    note: str = ""
    dtype: str = "float32"
    splits: Splits = Splits(count=10, shuffle_seed=2020)

    @property
    def prepared(self) -> str:
        """How pictures become the network's input, as an Identity says it."""
        smoothed = "antialiased" if self.antialias else "not antialiased"
        size = f"299 x 299, {self.kernel}, {smoothed}, to {self.dtype}"
        return f"8-bit RGB resized to {size}; (x - {self.centre:g}) / {self.scale:g}"


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="clean",
            resize="clean",
            kernel="bicubic as PIL does it, cut off at 0 and 255",
            antialias=True,
            centre=128,
            scale=128,
            usual_n=50_000,
            usual_reference="the training set, at the resolution of the samples",
            citation="Parmar et al. 2022, On Aliased Resizing and Surprising Subtleties in GAN Evaluation",
        ),
        Protocol(
            name="legacy_pytorch",
            resize="legacy_pytorch",
            kernel="bilinear with half-pixel centres",
            antialias=False,
            centre=127.5,
            scale=127.5,
            # Heusel et al.'s own number; tables of fewer, such as 10,000, are not to be compared with those
            # of it
            usual_n=50_000,
            usual_reference="the training or the validation set, at the resolution of the samples",
            citation="Seitzer 2020, pytorch-fid; the distance is Heusel et al. 2017's",
            note="its range is [-1, 1], a grey level off that of the TensorFlow graph",
        ),
        Protocol(
            name="torch_fidelity",
            resize="tensorflow1",
            kernel="bilinear of TensorFlow 1, corners at the origin",
            antialias=False,
            centre=128,
            scale=128,
            usual_n=50_000,
            usual_reference="the training set, at the resolution of the samples",
            citation="Obukhov et al. 2020, torch-fidelity; the distance is Heusel et al. 2017's",
        ),
        Protocol(
            name="adm",
            resize="tensorflow1",
            kernel="bilinear of TensorFlow 1, corners at the origin",
            antialias=False,
            centre=128,
            scale=128,
            usual_n=50_000,
            usual_reference="the moments of all of ImageNet's training set, in the published reference "
            "batch of the resolution, "
            "whose 10,000 pictures serve precision and recall",
            citation="Dhariwal and Nichol 2021, Diffusion Models Beat GANs on Image Synthesis",
            note="network and resize are those of torch_fidelity; the reference, N and the splits of the "
            "Inception Score are not",
            splits=Splits(size=5000),
        ),
    )
}

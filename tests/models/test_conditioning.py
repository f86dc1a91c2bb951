"""What a network is told besides x: sinusoids by their formula, label tables and their range, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from diffusion import NONE, Condition
from models import DiT, DiTParams, UNetParams
from models.layers.conditioning import LabelEmbedding, TimeEmbedding, check_labels, network_input, sinusoid
from tests.peers import diffusers

TIMES = [0.0, 0.25, 1.0, 17.3, 500.0, 999.0]


@pytest.mark.parametrize("max_period", [100.0, 10_000.0])
@pytest.mark.parametrize("dim", [2, 8, 320])
def test_sinusoid_follows_its_formula(dim: int, max_period: float) -> None:
    """Feature k is cos(t * max_period^(-k/half)), feature half + k its sine."""
    half = dim // 2
    expected = [
        [f(t * max_period ** (-k / half)) for f in (math.cos, math.sin) for k in range(half)] for t in TIMES
    ]
    # Angles are float32: at t near 1000 they are good to 6e-5, and so are their sines.
    torch.testing.assert_close(
        sinusoid(torch.tensor(TIMES), dim, max_period), torch.tensor(expected), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("dim", [2, 8, 320])
def test_sinusoid_equals_diffusers(dim: int) -> None:
    """It is diffusers' embedding as SD and DiT use it: cosines first, no frequency shift."""
    t = torch.tensor(TIMES)
    expected = diffusers.models.embeddings.get_timestep_embedding(
        t, dim, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    torch.testing.assert_close(sinusoid(t, dim), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.long])
def test_sinusoid_is_float32_for_any_dtype_of_t(dtype: torch.dtype) -> None:
    """Angles are computed in float32, so that a half-precision network still tells times apart."""
    t = torch.tensor([0, 7, 256], dtype=dtype)
    assert torch.equal(sinusoid(t, 64), sinusoid(t.float(), 64))
    assert sinusoid(t, 64).dtype == torch.float32


def test_time_factor_multiplies_t() -> None:
    """With factor 1000, t in [0, 1] embeds as the training index 1000 t."""
    index, unit = TimeEmbedding(32, 16), TimeEmbedding(32, 16, factor=1000.0)
    unit.load_state_dict(index.state_dict())
    t = torch.tensor([0.0, 250.0, 1000.0])
    assert torch.equal(unit(t / 1000), index(t))


def test_time_embedding_of_a_half_precision_network() -> None:
    """In bfloat16 the MLP runs in bfloat16, while neighbouring times, equal when rounded to bfloat16, stay
    apart."""
    embedding = TimeEmbedding(32, 16).to(torch.bfloat16)
    out = embedding(torch.tensor([998.0, 999.0]))
    assert out.dtype == torch.bfloat16
    assert not torch.equal(out[0], out[1])


def test_time_embedding_refuses_an_odd_number_of_frequencies() -> None:
    """Cosines and sines come in pairs."""
    with pytest.raises(ValueError, match="even number of frequencies, not 33"):
        TimeEmbedding(33, 16)


@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.zeros(2, 1)])
def test_times_are_one_per_sample(t: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"times are a tensor \(B,\), one per sample, not of shape"):
        sinusoid(t, 4)


def test_label_embedding_has_a_row_per_class_and_one_for_none() -> None:
    """Label k gives row k of the table, the null label `num_classes` the last one."""
    embedding = LabelEmbedding(10, 6)
    assert torch.equal(embedding(torch.arange(11)), embedding.table.weight)


@pytest.mark.parametrize("label", [[-1], [11], [3, 10, 12]])
def test_labels_out_of_range_raise(label: list[int]) -> None:
    """The error names the first wrong label, the classes, and the label that means no class."""
    message = rf"label {label[-1]} is out of range: classes are 0 to 9, and 10 means no class"
    with pytest.raises(ValueError, match=message):
        check_labels(torch.tensor(label), 10)
    with pytest.raises(ValueError, match=message):
        LabelEmbedding(10, 6)(torch.tensor(label))


def test_labels_in_range_pass() -> None:
    """Every class and the null label are accepted, and so is an empty batch."""
    check_labels(torch.arange(11), 10)
    check_labels(torch.empty(0, dtype=torch.long), 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(label=None), "this network needs the condition 'label': given: context"),
        (
            dict(guidance=torch.ones(2)),
            "this network does not take the condition 'guidance'; it takes: label, context",
        ),
        (
            dict(vector=torch.ones(2, 3)),
            "this network does not take the condition 'vector'; it takes: label, context",
        ),
        (
            dict(image=torch.ones(2, 1, 4, 4)),
            "this network does not take the condition 'image'; it takes: label, context",
        ),
        (
            dict(context=torch.ones(2, 3, 7)),
            "this network takes a context of width 8, not 7",
        ),
    ],
)
def test_conditions_must_be_exactly_those_expected(change: dict[str, Any], message: str) -> None:
    """A missing condition and a superfluous one raise and are named."""
    params, x = DiTParams(in_channels=1, num_classes=10, context_dim=8), torch.zeros(2, 1, 4, 4)
    condition = Condition(label=torch.zeros(2, dtype=torch.long), context=torch.zeros(2, 3, 8))
    assert network_input(x, condition, params) is x
    with pytest.raises(ValueError, match=message):
        network_input(x, replace(condition, **change), params)


def test_an_image_beside_x() -> None:
    """Its channels come behind those of x; what has other channels or another size is refused, with what the
    network takes."""
    params, x = UNetParams(in_channels=3, out_channels=1), torch.zeros(2, 1, 4, 4)
    image = torch.ones(2, 2, 4, 4, dtype=torch.float64)
    assert torch.equal(network_input(x, Condition(image=image), params), torch.cat([x, image.float()], dim=1))
    for told, message in (
        (NONE, "needs the condition 'image'"),
        (Condition(image=image[:, :1]), r"takes an image of shape \(2, 4, 4\) besides x, not \(1, 4, 4\)"),
        (Condition(image=image[..., :2]), r"not \(2, 4, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            network_input(x, told, params)
    with pytest.raises(ValueError, match="takes samples of 1 channels, not 3"):
        network_input(torch.zeros(2, 3, 4, 4), Condition(image=image), params)
    with pytest.raises(ValueError, match=r"network\(x, t, Condition\(\.\.\.\)\), not with"):
        network_input(x, {"image": image}, params)  # type: ignore[arg-type]


@pytest.mark.parametrize("label", [torch.tensor(3), torch.tensor([[3], [4]]), torch.tensor([3.0, 4.0])])
def test_labels_are_one_whole_number_per_sample(label: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"labels are whole numbers \(B,\)"):
        check_labels(label, 10)


def test_one_condition_per_sample() -> None:
    """A single condition is not spread over a batch in silence."""
    network = DiT(DiTParams(in_channels=1, image_size=8, hidden=16, depth=1, heads=2, num_classes=10))
    with pytest.raises(ValueError, match="1 conditions for 3 samples"):
        network(torch.zeros(3, 1, 8, 8), torch.zeros(3), Condition(label=torch.tensor([1])))

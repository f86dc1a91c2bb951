"""What families say of themselves is consistent; that it is right, the tests of loading, saving and
generating show."""

from __future__ import annotations

from typing import Any

import pytest

import models
from diffusion.spec import make_params
from models.families import ARCHITECTURES, BACKBONES, FAMILIES, architecture_of
from models.presets import TINY_TOWERS, published, tiny_description


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_is_of_one_architecture(family: str) -> None:
    """Published or tiny, with any image that it may see beside x: of its own, and of no other."""
    of = FAMILIES[family]
    described = tiny_description(family, TINY_TOWERS)["network"]
    kind = BACKBONES[described.pop("name")]
    for params in (published(family).network.params, make_params("", kind.params, described)):
        fitting = [
            each
            for each in ARCHITECTURES.values()
            if isinstance(params, each.kind.params) and each.matches(params)
        ]
        assert fitting == [of.architecture] == [architecture_of(params)]


ROLES: list[tuple[str, dict[str, Any], str | None]] = [
    ("sd1", {}, None),
    ("sd1", {"in_channels": 9}, "inpaint"),
    ("sdxl", {"in_channels": 8}, "edit"),
    ("lcm", {"in_channels": 8}, "edit"),
    ("flux-dev", {}, None),
    ("flux-fill", {}, "inpaint"),
    ("flux-canny", {}, "control"),
    ("sd3", {}, None),
]


@pytest.mark.parametrize(("family", "network", "role"), ROLES)
def test_roles_are_declared(family: str, network: dict[str, Any], role: str | None) -> None:
    """What a network does with an image beside x, whether it was distilled or not; diffusers has a pipeline
    for every role."""
    assert models.miniature(family, **network).role == role
    built = FAMILIES[family].architecture
    assert {None, *built.roles} == built.pipelines.keys()


def test_what_is_no_role_of_the_family_is_refused() -> None:
    """When the model is built: by its channels, and by a role in the description of a published family."""
    with pytest.raises(
        ValueError,
        match=r"sees 3 channels besides x: known for Stable Diffusion 1\.x are 5 \(inpaint\) or 4",
    ):
        models.miniature("sd1", in_channels=7)
    with pytest.raises(ValueError, match=r"leave role out: .* sd1 determines it"):
        models.build({**models.miniature("sd1", in_channels=8).spec, "role": "control"})

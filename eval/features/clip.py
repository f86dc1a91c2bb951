"""CLIP (Radford et al. 2021): the two towers of any network of OpenCLIP (Ilharco et al. 2021)."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import open_clip
import open_clip.convert
import torch
from torch import Tensor, nn

from eval.features.extractor import Extractor, Identity, TextFeatures
from eval.features.preparation import Preparation
from eval.features.sizes import by_size
from eval.features.weights import fill, is_torchscript, read_tensors, sha256_of_tensors
from models.files.text import sha256_of_file

OPENAI = {
    "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762": "RN50",
    "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599": "RN101",
    "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd": "RN50x4",
    "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa": "RN50x16",
    "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c": "RN50x64",
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af": "ViT-B-32",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f": "ViT-B-16",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836": "ViT-L-14",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02": "ViT-L-14-336",
}
"""The networks of OpenAI's archives, by SHA-256. No other archive is opened, since they hold code."""
QUICKGELU = "-quickgelu"
SCALARS = ("logit_scale", "logit_bias")  # of shape () or (1,), in files of different versions
OWN = "own"  # the tag of unpublished weights
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
CMMD = Preparation(336, MEAN, STD, fit="square")
"""Of CMMD (Jayasumana et al. 2024), as in its code: the centre, resized, for OpenAI's ViT-L-14-336."""


class ClipFeatures(Extractor):
    """{"image": D}: the projected embedding of a picture, of length 1.

    model      OpenCLIP's, with embeddings of `width`
    tokenizer  OpenCLIP's; None if OpenCLIP does not contain it
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        width: int,
        tokenizer: open_clip.SimpleTokenizer | None,
        preparation: Preparation,
        identity: Identity,
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.preparation, self.identity = tokenizer, preparation, identity
        self.widths = {"image": width}

    def prepare(self, pictures: Sequence[Tensor]) -> Tensor:
        """See `Preparation`."""
        return by_size(pictures, self.preparation)

    @torch.inference_mode()
    def features(self, x: Tensor, outputs: Collection[str]) -> dict[str, Tensor]:
        """See `Extractor`."""
        return {"image": self.model.encode_image(x, normalize=True).float()} if outputs else {}

    @torch.inference_mode()
    def text(self, prompts: Sequence[str]) -> TextFeatures:
        """Embeddings of captions. Too long ones are truncated, and keep their end-of-text token."""
        if self.tokenizer is None:
            raise ValueError(
                f"{self.identity.network} embeds pictures only: OpenCLIP does not contain its tokenizer"
            )
        length = self.tokenizer.context_length
        longer = self.tokenizer(
            list(prompts), length + 1
        )  # too long captions have a token in the last column
        tokens = self.tokenizer(list(prompts), length).to(self.device, non_blocking=True)
        rows = self.model.encode_text(tokens, normalize=True).float()
        return TextFeatures(rows, tuple((longer[:, length] != 0).tolist()))


def load_clip(
    name: str, path: str | Path, tag: str | None = None, preparation: Preparation | None = None
) -> ClipFeatures:
    """The towers of OpenCLIP's network `name` from its .safetensors, .bin or .pt, or from OpenAI's archive.

    tag          OpenCLIP's name of the weights ("openai", "laion2b_s34b_b79k"), or "own". It determines the
                 activation and the preparation of pictures. Needed if published weights of this network
                 differ in these, and the file is not OpenAI's archive
    preparation  in place of the published one: CMMD, ...

    ValueError for an unknown network or tag, weights of another network, and a network with QuickGELU for
    weights without it.
    """
    digest = sha256_of_file(path)
    archive = is_torchscript(path)
    if archive:
        tag = _tag_of_archive(name, path, digest, tag)
    tag = tag or _only_tag(name)
    published = _published(name, tag)
    model = _build(name, bool(published.get("quick_gelu", False)))
    tensors = _read_archive(path) if archive else read_tensors(path)
    fill(model, _renamed(model, tensors), str(path))
    return _extractor(name, model, digest, preparation or _prepared(model, published), random=False)


def random_clip(name: str, seed: int = 0, preparation: Preparation | None = None) -> ClipFeatures:
    """With random weights, for trials: the numbers mean nothing, and the identity says so."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _build(name, quick_gelu=False)
    weights = sha256_of_tensors(model.state_dict())
    return _extractor(name, model, weights, preparation or _prepared(model, {}), random=True)


def _extractor(
    name: str, model: nn.Module, weights: str, preparation: Preparation, random: bool
) -> ClipFeatures:
    quick = any(isinstance(module, open_clip.transformer.QuickGELU) for module in model.modules())
    network = f"clip {name.removesuffix(QUICKGELU)}, {'QuickGELU' if quick else 'GELU'}"
    identity = Identity(network, weights, str(preparation), random)
    config = _config(name)
    text = config["text_cfg"]
    foreign = "hf_tokenizer_name" in text or "siglip" in name.lower()
    tokenizer = None if foreign else open_clip.SimpleTokenizer(
        context_length=text.get("context_length", 77), **text.get("tokenizer_kwargs", {})
    )  # fmt: skip
    return ClipFeatures(model, config["embed_dim"], tokenizer, preparation, identity)


def _config(name: str) -> dict[str, Any]:
    """Of a network, by its name in OpenCLIP; no hub is asked."""
    if name not in open_clip.list_models():
        raise ValueError(
            f"OpenCLIP has no network {name!r}; python -c 'import open_clip; "
            "print(open_clip.list_models())' lists them"
        )
    config: dict[str, Any] = open_clip.get_model_config(name)
    if "hf_model_name" in config["text_cfg"]:
        raise ValueError(
            f"{name} has a text tower of a hub, {config['text_cfg']['hf_model_name']}: take another network"
        )
    return config


def _build(name: str, quick_gelu: bool) -> nn.Module:
    """The network with random weights; with QuickGELU if weights or configuration have it."""
    config = _config(name)
    if quick_gelu:
        config["quick_gelu"] = True
    custom_text = config.pop("custom_text", False)
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    model: nn.Module = (open_clip.CoCa if "multimodal_cfg" in config else kind)(**config)
    return model


def _published(name: str, tag: str) -> dict[str, Any]:
    """OpenCLIP's mean, std, interpolation, resize_mode and quick_gelu of published weights."""
    if tag == OWN:
        return {}
    tags = open_clip.list_pretrained_tags_by_model(name)
    base = open_clip.list_pretrained_tags_by_model(name.removesuffix(QUICKGELU))
    if tag in base and tag not in tags:
        plain = name.removesuffix(QUICKGELU)
        raise ValueError(f"the weights {tag} were trained with GELU: load them as {plain}, not {name}")
    if tag not in tags:
        raise ValueError(f"OpenCLIP knows no weights {tag!r} of {name}; known are {', '.join((*tags, OWN))}")
    published: dict[str, Any] = open_clip.get_pretrained_cfg(name, tag)
    return published


def _only_tag(name: str) -> str:
    """A tag of published weights, or "own". ValueError if published weights are used differently."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    keys = ("quick_gelu", "mean", "std", "interpolation", "resize_mode")
    uses = {str([_published(name, tag).get(key) for key in keys]) for tag in tags}
    if len(uses) > 1:
        raise ValueError(
            f"tag=... must say which weights of {name} these are, since activation or preparation differ: "
            f"{', '.join((*tags, OWN))}"
        )
    return tags[0] if tags else OWN


def _prepared(model: Any, published: dict[str, Any]) -> Preparation:
    """That of the published weights, or OpenAI's if unknown."""
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"only networks for square pictures are known, not {height}x{width}")
    get = published.get
    fit, kernel = get("resize_mode", "shortest"), get("interpolation", "bicubic")
    return Preparation(height, get("mean", MEAN), get("std", STD), fit, kernel)


def _tag_of_archive(name: str, path: str | Path, digest: str, tag: str | None) -> str:
    """ "openai". ValueError for an archive that is not OpenAI's, or of another network."""
    if digest not in OPENAI:
        raise ValueError(
            f"{path} is a TorchScript archive, which holds code, not OpenAI's: use a file of weights"
        )
    if OPENAI[digest] != name.removesuffix(QUICKGELU):
        raise ValueError(f"{path} is OpenAI's {OPENAI[digest]}, not {name}")
    if tag not in (None, "openai"):
        raise ValueError(f"{path} is OpenAI's {OPENAI[digest]}: its tag is openai, not {tag}")
    return "openai"


def _read_archive(path: str | Path) -> dict[str, Tensor]:
    """The weights in OpenAI's archive."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated
        tensors = torch.jit.load(str(path), map_location="cpu").state_dict()
    numbers = ("input_resolution", "context_length", "vocab_size")
    return {key: tensor for key, tensor in tensors.items() if key not in numbers}


def _renamed(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the names and shapes of this version of OpenCLIP."""
    tensors = open_clip.convert.convert_state_dict(model, tensors)
    if "positional_embedding" in tensors and not hasattr(model, "positional_embedding"):
        tensors = open_clip.model.convert_to_custom_text_state_dict(tensors)
    own = model.state_dict()
    scalars = {key for key in SCALARS if key in own and key in tensors and tensors[key].numel() == 1}
    return {
        key: tensor.reshape(own[key].shape) if key in scalars else tensor for key, tensor in tensors.items()
    }

"""How Ministral 3 sees: picture -> pixels -> patches -> Pixtral encoder -> projector -> embeddings among the text's.

    a picture of 500 x 300 pixels                                      (height x width)
    -> scaled down if an edge is longer than 1540 pixels, then stretched to whole merged patches of 28 x 28 pixels:
       504 x 308; RGB, normalised                                      pixel_values (3, 504, 308)
    -> a convolution turns patches of 14 x 14 pixels into vectors      36 x 22 = 792 patches of 1024 numbers
    -> a transformer in which every patch sees every patch of its own picture, with rotary positions in two
       dimensions (`PixtralRotaryEmbedding`)
    -> four neighbours are merged into one vector of 4096 numbers and projected to the size of the language model's
       embeddings                                                      18 x 11 = 198 vectors
    -> these replace the embeddings of the 198 [IMG] tokens in the prompt, row by row:
       11 x [IMG] [IMG_BREAK] 11 x [IMG] [IMG_BREAK] ... 11 x [IMG] [IMG_END]

Pictures of a batch are encoded in one go, but do not see each other. Written as a mask over the patches of two
pictures, of 3 and 4 patches, that is

    # # # . . . .
    # # # . . . .
    # # # . . . .
    . . . # # # #
    . . . # # # #
    . . . # # # #
    . . . # # # #

No such mask is built here: attention runs picture by picture, so its cost grows with the sum of the squares and not
with the square of the sum. Read `ministral.py` and `ministral3.py` first. Names follow Transformers
(`Mistral3ForConditionalGeneration`). Sources: Pixtral https://arxiv.org/abs/2410.07073, Ministral 3
https://arxiv.org/abs/2601.08584. Letters in the shape comments, beside those of `ministral.py`:

    N  pictures                      P  patches of all pictures together          C  size of the encoder's vectors
"""

from __future__ import annotations

import base64
import io
import math
import os
import threading
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from checks import (
    check_common_fields,
    check_start,
    expect_labels,
    expect_tensor,
    is_number,
    require,
    require_sizes,
)
from ministral import (
    ATTENTION,
    KVCache,
    MinistralConfig,
    MinistralMLP,
    MinistralModel,
    RMSNorm,
    RopeTables,
    apply_rotary_pos_emb,
    eager_attention,
)
from ministral3 import Ministral3Config, Ministral3Model
from pretrained import (
    ACTIVATIONS,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    Linear,
    PreTrainedConfig,
    PreTrainedModel,
    at_least_float32,
    exportable,
    init_weights,
    logits_and_loss,
)

if TYPE_CHECKING:
    from PIL import Image

ImageSizes = Sequence[Sequence[int]] | Tensor  # (height, width) in pixels of each picture

# ---------------------------------------------------------------------------------------------- configuration


@dataclass
class PixtralVisionConfig(PreTrainedConfig):
    """The numbers of the encoder. Fields and defaults are Transformers'; Ministral 3 has patch_size 14, image_size 1540
    and hidden_act silu.

    Raises:
        ValueError: a value is impossible; the message names the field, the value and what is allowed.
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 1024  # the longest edge, in pixels
    patch_size: int = 16
    hidden_act: str = "gelu"
    attention_dropout: float = 0.0
    rope_theta: float = None  # type: ignore[assignment]  # None here and below is replaced on construction
    rope_parameters: dict[str, Any] = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    initializer_range: float = 0.02
    attn_implementation: str = "sdpa"

    model_type: ClassVar[str] = "pixtral"
    source: ClassVar[str] = "vision_config"

    def __post_init__(self) -> None:
        rope = dict(self.rope_parameters or {})
        kind = rope.get("rope_type") or rope.get("type") or "default"
        theta = rope.get("rope_theta", 10000.0 if self.rope_theta is None else self.rope_theta)
        require(self, "rope_theta", self.rope_theta in (None, theta), f"None, or rope_parameters' own, {theta}")
        require(self, "rope_parameters", kind in ("default", "axial"), "rope_type default, or axial, which is the same")
        require(self, "rope_parameters", rope.keys() <= {"rope_type", "type", "rope_theta"}, "rope_type and rope_theta")
        require(self, "rope_parameters", is_number(theta, float, 1.0), "a rope_theta not below 1")
        self.rope_theta, self.rope_parameters = theta, {"rope_type": "default", "rope_theta": theta}
        require_sizes(self, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        require_sizes(self, "num_channels", "image_size", "patch_size")
        check_common_fields(self, ACTIVATIONS, ATTENTION)
        heads, size = self.num_attention_heads, self.hidden_size // self.num_attention_heads
        whole = size * heads == self.hidden_size and size % 4 == 0
        require(self, "hidden_size", whole, f"a multiple of 4 for each of {heads} heads")
        require(self, "head_dim", self.head_dim in (None, size), f"hidden_size / num_attention_heads = {size}")
        self.head_dim = size

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> PixtralVisionConfig:
        """See `PreTrainedConfig.from_dict`. Transformers writes a vocab_size here, for no reason."""
        return super().from_dict({k: v for k, v in d.items() if k != "vocab_size"})

    def to_dict(self) -> dict[str, Any]:
        """The vision part of a config.json that Transformers 5 loads."""
        values = {k: v for k, v in asdict(self).items() if k not in ("attn_implementation", "rope_theta")}
        return {"model_type": self.model_type} | values


TEXT: dict[str, tuple[type[MinistralConfig], type[MinistralModel]]] = {
    "ministral3": (Ministral3Config, Ministral3Model),
    "ministral": (MinistralConfig, MinistralModel),
    "mistral": (MinistralConfig, MinistralModel),
}


@dataclass
class Mistral3Config(PreTrainedConfig):
    """A Ministral 3 with eyes: `vision_config`, `text_config` (each a configuration or the dictionary for one), and
    what joins them. None takes the published 8B model's; a text part without `model_type` is a "ministral3".
    `attn_implementation` is that of both parts.

    `tie_word_embeddings=None` takes the text part's word, and without one ties. The published files have none at the
    top, where Transformers looks for it.

    Raises:
        ValueError: a value is impossible; the message names the field, the value and what is allowed.
    """

    vision_config: PixtralVisionConfig = None  # type: ignore[assignment]  # None here and below is replaced
    text_config: MinistralConfig = None  # type: ignore[assignment]
    image_token_index: int = 10
    projector_hidden_act: str = "gelu"
    vision_feature_layer: int | list[int] = -1  # which of the num_hidden_layers + 1 hidden states is projected
    multimodal_projector_bias: bool = False
    spatial_merge_size: int = 2
    tie_word_embeddings: bool = None  # type: ignore[assignment]
    attn_implementation: str = "sdpa"

    model_type: ClassVar[str] = "mistral3"

    def __post_init__(self) -> None:
        vision, text, tied = self.vision_config, self.text_config, self.tie_word_embeddings
        valid = isinstance(vision, (PixtralVisionConfig, dict, type(None)))
        require(self, "vision_config", valid, "an object, or none")
        valid = isinstance(text, (MinistralConfig, dict, type(None)))
        require(self, "text_config", valid, "an object, or none")
        if vision is None:
            vision = PixtralVisionConfig(patch_size=14, image_size=1540, hidden_act="silu")
        elif isinstance(vision, dict):
            vision = PixtralVisionConfig.from_dict(vision)
        if isinstance(text, dict):
            tied = text.get("tie_word_embeddings", True) if tied is None else tied
            kind = text.get("model_type") or "ministral3"
            require(self, "text_config", kind in TEXT, f"model_type {', '.join(TEXT)}")
            text = TEXT[kind][0].from_dict(text)
        elif text is None:
            text = Ministral3Config()
        self.tie_word_embeddings = text.tie_word_embeddings if tied is None else tied
        self.vision_config = replace(vision, attn_implementation=self.attn_implementation)
        self.text_config = replace(text, attn_implementation=self.attn_implementation)
        self.feature_index()
        image = self.image_token_index
        known = is_number(image, int, 0) and image < text.vocab_size
        require(self, "image_token_index", known, "an id of the vocabulary")
        require(self, "projector_hidden_act", self.projector_hidden_act in ACTIVATIONS, ", ".join(ACTIVATIONS))
        biased = self.multimodal_projector_bias
        require(self, "multimodal_projector_bias", isinstance(biased, bool), "true or false")
        require_sizes(self, "spatial_merge_size")
        require(self, "tie_word_embeddings", isinstance(self.tie_word_embeddings, bool), "true or false")

    def feature_index(self, layer: int | list[int] | None = None) -> int:
        """The index, from 0, of the encoder's hidden state that is projected: of `vision_feature_layer`, or of `layer`
        if given, a number or a list of one, where -1 is the last (raises ValueError)."""
        layer = self.vision_feature_layer if layer is None else layer
        number: Any = layer[0] if isinstance(layer, list) and len(layer) == 1 else layer
        last = self.vision_config.num_hidden_layers
        if not is_number(number, int, -last - 1) or number > last:
            allowed = f"one number from {-last - 1} to {last}"
            raise ValueError(f"vision_feature_layer={layer!r} is impossible; allowed: {allowed}")
        return int(number) % (last + 1)

    def get_text_config(self) -> MinistralConfig:
        """The configuration of the language model."""
        return self.text_config

    @property
    def image_token_id(self) -> int:
        """The id of [IMG]."""
        return self.image_token_index

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Mistral3Config:
        """See `PreTrainedConfig.from_dict`. `image_token_id` is another name of `image_token_index`."""
        if "image_token_id" in d:
            d = {"image_token_index": d["image_token_id"]} | {k: v for k, v in d.items() if k != "image_token_id"}
        return super().from_dict(d)

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that Transformers 5 loads."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "attn_implementation"}
        parts = {"vision_config": self.vision_config.to_dict(), "text_config": self.text_config.to_dict()}
        return {"model_type": self.model_type} | own | parts


# ---------------------------------------------------------------------------------------------------- pictures

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of red, green and blue
MAX_PIXELS, MAX_BYTES, TIMEOUT = 10**8, 50 * 10**6, 20  # of a picture, of its file, seconds for a download
SHORTEST_BASE64 = 40  # characters: the smallest image files, GIFs, have 35 bytes
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # (others run other programs, or are rare)


def load_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """An image from a file, an address (http, https, `file:`, or `data:` with base64), base64 alone, or the
    bytes of a file, upright if its EXIF data say how it was held. An image of Pillow's is returned as it is.

    Raises:
        FileNotFoundError: no such file, or the address cannot be reached.
        ValueError: Pillow is missing; a source of another kind; no image in one of FORMATS, a damaged one, or
            more than MAX_PIXELS pixels.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ValueError("pictures need Pillow: pip install pillow") from error
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, (str, bytes, os.PathLike)):
        found = type(source).__name__
        supported = "a path, an address, the bytes of a file, or an image of Pillow's"
        raise ValueError(f"an image is given as {found}; supported: {supported}")
    name = "the picture" if isinstance(source, bytes) else str(source)
    name = name if len(name) <= 100 else name[:60] + "..."
    data = source if isinstance(source, bytes) else _read(str(source), name)
    too_large = f"{name} has more than {MAX_PIXELS // 10**6} million pixels; scale it down"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on what it can still read
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            small = image.width * image.height <= MAX_PIXELS
            if small:
                image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(too_large) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is no picture; allowed: {', '.join(FORMATS)}") from error
    except Exception as error:  # of many kinds, one for each format and defect
        raise ValueError(f"{name} is damaged or no picture ({type(error).__name__}: {error})") from error
    if not small:
        raise ValueError(too_large)
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF data that cannot be read turn nothing
        return image


def _read(source: str, name: str) -> bytes:
    if source[:5].lower() == "data:":
        head, _, data = source.partition(",")
        try:
            if not head.lower().rstrip().endswith(";base64"):
                raise ValueError("not base64")
            return base64.b64decode("".join(urllib.parse.unquote(data).split()), validate=True)
        except ValueError as error:
            raise ValueError(f"{name} is no data:...;base64, address of a picture ({error})") from error
    if source.lower().startswith(("http://", "https://")):
        return _download(source, name)
    try:
        path = _local_path(source)
        if path.exists() and not path.is_file():
            raise OSError("not a file")
        with path.open("rb") as file:
            data_read = file.read(MAX_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:
        decoded = _base64(source)
        if decoded is not None:
            return decoded
        reason = getattr(error, "strerror", None) or error
        raise FileNotFoundError(f"{name or 'an empty name'} cannot be read ({reason})") from error
    return _limited(data_read, name)


def _local_path(source: str) -> Path:
    """The file that a name or a `file:` address means. mistral-common reads what follows file:// as it is;
    others encode blanks and the like in it, as addresses have them."""
    if source[:7].lower() != "file://":
        return Path(source).expanduser()
    rest = source[7:]
    if os.path.isfile(rest):
        return Path(rest)
    rest = rest.removeprefix("localhost")
    if not rest.startswith("/"):
        raise ValueError("allowed: file:///absolute/path, on this machine")
    return Path(urllib.request.url2pathname(rest))


def _base64(source: str) -> bytes | None:
    """What a text is in base64 if it can be that of an image, as mistral-common and Transformers take it."""
    text = "".join(source.split())
    if len(text) < SHORTEST_BASE64:
        return None
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return None


def _limited(data: bytes, name: str) -> bytes:
    if len(data) > MAX_BYTES:
        raise ValueError(f"{name} has more than {MAX_BYTES // 10**6} MB; scale it down")
    return data


def _download(address: str, name: str) -> bytes:
    """What a web address holds. It runs in a thread, because a server can dribble for ever below any socket's time-out.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler, urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor,
    ):  # fmt: skip
        opener.add_handler(handler())  # and none for files or FTP, to which a server might redirect
    result: list[bytes | Exception] = []

    def fetch() -> None:
        try:
            with opener.open(address, timeout=TIMEOUT) as response:
                result.append(response.read(MAX_BYTES + 1))
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    answer = result[0] if result else TimeoutError(f"no answer within {TIMEOUT} s")
    if isinstance(answer, Exception):
        raise FileNotFoundError(f"{name} cannot be fetched ({answer or type(answer).__name__})") from answer
    return _limited(answer, name)


def mistral_size(height: int, width: int, longest_edge: int, multiple: int) -> tuple[int, int]:
    """The (height, width) to which a picture is resized, by the rule of mistral-common: scaled down until no edge is
    longer than `longest_edge`, rounded (halves to even) but not to nothing, then up to multiples of `multiple`."""
    ratio = max(height / longest_edge, width / longest_edge)
    if ratio > 1:
        height, width = max(round(height / ratio), 1), max(round(width / ratio), 1)
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def transformers_size(height: int, width: int, longest_edge: int, multiple: int) -> tuple[int, int]:
    """The same by the rule of Transformers, which rounds down. Of pictures with random edges up to 6000 pixels 1.6 %
    get another number of patches.

    Raises:
        ValueError: nothing is left of the shorter edge.
    """
    ratio = max(height / longest_edge, width / longest_edge)
    if ratio > 1:
        height, width = math.floor(height / ratio), math.floor(width / ratio)
    if min(height, width) < 1:
        raise ValueError(f"scaled to {longest_edge} pixels, the picture is {height} x {width}: no pixel is left")
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def preprocess(
    image: Image.Image, config: Mistral3Config, rule: Callable[[int, int, int, int], tuple[int, int]] = mistral_size
) -> Tensor:
    """A picture as the encoder wants it, float32 (3, height, width), both multiples of the merged patch. What is
    transparent becomes white. Resampled by Pillow's bicubic filter, as in Transformers (mistral-common has OpenCV's).
    16-bit grey is clipped to 8 bits, as there.

    Args:
        rule: `mistral_size` or `transformers_size`.
    """
    from PIL import Image

    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    vision = config.vision_config
    size = rule(image.height, image.width, vision.image_size, vision.patch_size * config.spatial_merge_size)
    image = image.convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC)
    scaled = np.asarray(image, np.float32) / np.float32(255)
    x = (scaled - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(x).permute(2, 0, 1).contiguous()


def batch_images(images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Pictures (3, h, w) of any sizes -> pixel_values (N, 3, height, width), zeros to the right and below, and
    image_sizes.

    Raises:
        ValueError: no picture.
    """
    if not images:
        raise ValueError("no pictures to put into a batch; leave pixel_values out")
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    height, width = (max(edges) for edges in zip(*sizes))
    return torch.stack([F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in images]), sizes


def image_tokens(size: tuple[int, int], config: Mistral3Config, break_id: int, end_id: int) -> list[int]:
    """The ids that stand for a picture of (height, width) pixels in a prompt."""
    merged = config.vision_config.patch_size * config.spatial_merge_size
    row = [config.image_token_id] * (size[1] // merged) + [break_id]
    return (row * (size[0] // merged))[:-1] + [end_id]


# ----------------------------------------------------------------------------------------------------- encoder


@exportable
@dataclass
class BaseModelOutput:
    """What `PixtralVisionModel` returns: `last_hidden_state` (1, P, C), the patches of all pictures in a row;
    `hidden_states`, if wanted, num_hidden_layers + 1 of these, the first one before the first layer."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class PixtralRotaryEmbedding(nn.Module):
    """Rotary positions in two dimensions. Of the frequencies theta^(-2i/D), i < D/2, the even ones turn with a patch's
    row and the odd ones with its column: pair i < D/4 of a head turns by row * f[2i], pair D/4 + i by column * f[2i+1].
    """

    def __init__(self, config: PixtralVisionConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, position_ids: Tensor) -> RopeTables:
        """position_ids (P, 2), rows and columns -> cosines and sines, each (1, P, D) in the dtype of x."""
        dtype, D = at_least_float32(x.dtype), self.config.head_dim
        exponents = torch.arange(0, D, 2, dtype=dtype, device="cpu") / D
        frequencies = (1.0 / self.config.rope_theta**exponents).to(x.device)  # (D/2,)
        row, column = position_ids[:, :, None].to(dtype).unbind(1)  # (P, 1) each
        angles = torch.cat((row * frequencies[0::2], column * frequencies[1::2]), dim=-1)  # (P, D/2)
        angles = torch.cat((angles, angles), dim=-1)[None]
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class PixtralAttention(nn.Module):
    """Every patch looks at every patch of its own picture. No biases."""

    def __init__(self, config: PixtralVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.k_proj = Linear(config.hidden_size, config.hidden_size)
        self.v_proj = Linear(config.hidden_size, config.hidden_size)
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.o_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, tables: RopeTables, patches: list[int]) -> Tensor:
        """x (1, P, C), patches: how many each picture has -> (1, P, C)."""
        heads = (1, x.shape[1], -1, self.config.head_dim)
        q, k, v = (part(x).view(heads).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *tables)  # (1, H, P, D)
        pictures = zip(*(part.split(patches, dim=2) for part in (q, k, v)))
        out = torch.cat([self._attend(*picture) for picture in pictures], dim=2)
        return self.o_proj(out.transpose(1, 2).reshape(x.shape))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scaling, dropout = self.config.head_dim**-0.5, self.config.attention_dropout if self.training else 0.0
        if self.config.attn_implementation == "eager":
            return eager_attention(q, k, v, None, scaling, dropout)[0]
        return F.scaled_dot_product_attention(q, k, v, None, dropout, scale=scaling)


class PixtralAttentionLayer(nn.Module):
    """Attention, then MLP, each reading a normed copy of the residual stream and adding its result to it."""

    def __init__(self, config: PixtralVisionConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=1e-5)
        self.feed_forward = MinistralMLP(config)  # type: ignore[arg-type]  # has the three fields it reads
        self.attention = PixtralAttention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, eps=1e-5)

    def forward(self, x: Tensor, tables: RopeTables, patches: list[int]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), tables, patches)
        return x + self.feed_forward(self.ffn_norm(x))


class PixtralVisionModel(PreTrainedModel):
    """The encoder: pictures in, one vector for each patch out. There is no norm after the last layer."""

    config_class = PixtralVisionConfig
    base_model_prefix = "vision_encoder"

    def __init__(self, config: PixtralVisionConfig) -> None:
        super().__init__(config)
        size = config.patch_size
        self.patch_conv = nn.Conv2d(config.num_channels, config.hidden_size, size, stride=size, bias=False)
        self.ln_pre = RMSNorm(config.hidden_size, eps=1e-5)
        layers = nn.ModuleList(PixtralAttentionLayer(config) for _ in range(config.num_hidden_layers))
        self.transformer = nn.ModuleDict({"layers": layers})
        self.patch_positional_embedding = PixtralRotaryEmbedding(config)
        init_weights(self, config.initializer_range)

    def own_name(self, stored: str) -> str | None:
        """Its own files name tensors as it does."""
        return stored

    def grids(self, pixel_values: Tensor, image_sizes: ImageSizes | None) -> list[tuple[int, int]]:
        """Rows and columns of whole patches that each picture has.

        Raises:
            ValueError: pixel_values or image_sizes of a wrong shape, or a picture larger than its pixel_values or
                smaller than a patch.
        """
        channels, size = self.config.num_channels, self.config.patch_size
        expect_tensor("pixel_values", pixel_values)
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values of {pixel_values.dtype} are not supported; supported: see `preprocess`")
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            found = tuple(pixel_values.shape)
            raise ValueError(f"pixel_values must be (images, {channels}, height, width); found {found}")
        N, _, height, width = pixel_values.shape
        if N == 0:
            raise ValueError("pixel_values hold no picture; leave them out")
        sizes: Any = [(height, width)] * N if image_sizes is None else image_sizes
        sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
        pairs = isinstance(sizes, Sequence) and all(isinstance(pair, Sequence) and len(pair) == 2 for pair in sizes)
        if not pairs or len(sizes) != N or any(int(edge) != edge for pair in sizes for edge in pair):
            raise ValueError(f"image_sizes must be a (height, width) for each of {N} pictures; found {sizes}")
        for h, w in sizes:
            if not (size <= h <= height and size <= w <= width):
                raise ValueError(f"an image size of {h} x {w}; allowed: {size} x {size} to {height} x {width} pixels")
        return [(int(h) // size, int(w) // size) for h, w in sizes]

    def forward(
        self, pixel_values: Tensor, image_sizes: ImageSizes | None = None,
        output_hidden_states: bool | list[int] = False,
    ) -> BaseModelOutput:  # fmt: skip
        """Encode pictures.

        Args:
            pixel_values: (N, 3, height, width), see `preprocess`.
            image_sizes: the (height, width) in pixels of each picture within that; None: all of it.
            output_hidden_states: return all of them; or a list of the indices that are wanted (others are None).

        Raises:
            ValueError: see `grids`.
        """
        grids = self.grids(pixel_values, image_sizes)
        x = self.patch_conv(pixel_values.to(self.patch_conv.weight))  # (N, C, rows, columns)
        x = torch.cat([image[:, :h, :w].flatten(1).T for image, (h, w) in zip(x, grids)])[None]  # (1, P, C)
        x = self.ln_pre(x)
        positions = torch.cat([torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in grids])
        tables = self.patch_positional_embedding(x, positions.to(x.device))
        patches = [h * w for h, w in grids]
        layers: list[Any] = list(self.transformer["layers"])  # type: ignore[call-overload]
        wanted = range(len(layers) + 1) if output_hidden_states is True else output_hidden_states or ()
        hidden_states: list[Any] = [x if 0 in wanted else None]
        for i, layer in enumerate(layers, start=1):
            x = self.run_layer(layer, x, tables, patches)
            hidden_states.append(x if i in wanted else None)
        return BaseModelOutput(x, tuple(hidden_states) if wanted else None)


# --------------------------------------------------------------------------------------------------- projector


class Mistral3PatchMerger(nn.Module):
    """Makes one vector of spatial_merge_size x spatial_merge_size neighbours."""

    def __init__(self, config: Mistral3Config) -> None:
        super().__init__()
        self.merge, size = config.spatial_merge_size, config.vision_config.hidden_size
        self.merging_layer = Linear(size * self.merge**2, size)

    def forward(self, x: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """x (P, C), the patches of all pictures -> (merged patches, C); a last odd row or column is left out.

        The numbers of the neighbours are interleaved, not appended: channel by channel, and of each channel the upper
        left, upper right, lower left, lower right one."""
        m, merged = self.merge, []
        pictures = torch.split(x, [h * w for h, w in grids])
        for image, (h, w) in zip(pictures, grids):
            grid = image.view(h, w, -1)[: h // m * m, : w // m * m]
            blocks = grid.reshape(h // m, m, w // m, m, -1).permute(0, 2, 4, 1, 3)  # (rows, columns, C, m, m)
            merged.append(blocks.reshape((h // m) * (w // m), -1))
        return self.merging_layer(torch.cat(merged))


class Mistral3MultiModalProjector(nn.Module):
    """From the encoder's vectors to embeddings of the language model: norm, merge, two linear layers."""

    def __init__(self, config: Mistral3Config) -> None:
        super().__init__()
        vision, text, bias = config.vision_config, config.text_config, config.multimodal_projector_bias
        self.norm = RMSNorm(vision.hidden_size, text.rms_norm_eps)
        self.patch_merger = Mistral3PatchMerger(config)
        self.linear_1 = Linear(vision.hidden_size, text.hidden_size, bias)
        self.act = ACTIVATIONS[config.projector_hidden_act]
        self.linear_2 = Linear(text.hidden_size, text.hidden_size, bias)

    def forward(self, x: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """(P, C) -> (merged patches, E)."""
        return self.linear_2(self.act(self.linear_1(self.patch_merger(self.norm(x), grids))))


# ------------------------------------------------------------------------------------------------------ models


@exportable
@dataclass
class Mistral3ModelOutputWithPast(BaseModelOutputWithPast):
    """As `BaseModelOutputWithPast`, and `image_hidden_states` (number of [IMG] tokens, E), what took their places."""

    image_hidden_states: Tensor | None = None


@exportable
@dataclass
class Mistral3CausalLMOutputWithPast(CausalLMOutputWithPast):
    """As `CausalLMOutputWithPast`, and `image_hidden_states` (number of [IMG] tokens, E), what took their places."""

    image_hidden_states: Tensor | None = None


class Mistral3PreTrainedModel(PreTrainedModel):
    """What the model with and without head share: their files."""

    config_class = Mistral3Config

    def own_name(self, stored: str) -> str | None:
        """See `checkpoint.text_name` for the names that files have."""
        if stored.endswith("rotary_emb.inv_freq"):
            return None
        text = checkpoint.text_name(stored)
        if text is not None and text.startswith("lm_head."):
            return text if hasattr(self, "lm_head") else None
        name = stored.removeprefix("model.") if text is None else "language_model." + text
        return name if self.base_model is self else "model." + name


class Mistral3Model(Mistral3PreTrainedModel):
    """Encoder, projector and language model, without head."""

    def __init__(self, config: Mistral3Config) -> None:
        super().__init__(config)
        self.vision_tower = PixtralVisionModel(config.vision_config)
        self.multi_modal_projector = Mistral3MultiModalProjector(config)
        self.language_model = TEXT[config.text_config.model_type][1](config.text_config)
        init_weights(self.multi_modal_projector, config.text_config.initializer_range)

    def get_image_features(
        self, pixel_values: Tensor, image_sizes: ImageSizes | None = None, vision_feature_layer: int | None = None
    ) -> tuple[Tensor, ...]:
        """Pictures -> for each its embeddings, (number of its [IMG] tokens, E).

        Args:
            pixel_values, image_sizes: see `PixtralVisionModel.forward`.
            vision_feature_layer: which hidden state is projected; None takes the configuration's word.
        """
        index = self.config.feature_index(vision_feature_layer)
        grids, m = self.vision_tower.grids(pixel_values, image_sizes), self.config.spatial_merge_size
        if min(min(grid) for grid in grids) < m:
            raise ValueError(f"pictures of {grids} patches; allowed: {m} x {m} or more, which are merged into one")
        hidden_states = self.vision_tower(pixel_values, image_sizes, [index]).hidden_states
        features = self.multi_modal_projector(hidden_states[index][0], grids)
        return features.split([(h // m) * (w // m) for h, w in grids])

    def embed(
        self, input_ids: Tensor | None, pixel_values: Tensor | None, image_sizes: ImageSizes | None = None,
        inputs_embeds: Tensor | None = None, vision_feature_layer: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The embeddings (B, S, E) of a text with pictures in it, and those of the pictures alone. Pictures take the
        [IMG] tokens in order, row after row of the batch. (In `inputs_embeds`, [IMG] is known by its embedding.)

        Raises:
            ValueError: not as many [IMG] tokens as the pictures have embeddings; as `MinistralModel.forward`.
        """
        embeds = self.language_model.embed(input_ids, inputs_embeds)
        if pixel_values is None:
            return embeds, None
        if input_ids is None:
            image = torch.tensor(self.config.image_token_id, device=embeds.device)
            places = (embeds == self.language_model.embed_tokens(image)).all(-1)
        else:
            places = input_ids == self.config.image_token_id
        features = torch.cat(self.get_image_features(pixel_values, image_sizes, vision_feature_layer))
        if not torch.compiler.is_compiling() and places.sum() != len(features):
            found = f"{int(places.sum())} [IMG] tokens (id {self.config.image_token_id})"
            raise ValueError(f"{found} for pictures that have {len(features)} embeddings; the numbers must be equal")
        features = features.to(embeds)
        return embeds.masked_scatter(places[:, :, None], features), features

    def forward(
        self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None, vision_feature_layer: int | None = None, use_cache: bool | None = None,
        image_sizes: ImageSizes | None = None, **kwargs: Any,
    ) -> Mistral3ModelOutputWithPast:  # fmt: skip
        """The arguments of `MinistralModel.forward`, and:

        Args:
            pixel_values, image_sizes: the pictures whose [IMG] tokens are in `input_ids`, see
                `PixtralVisionModel.forward`. To cut a text in the middle of a picture, `embed` it first.
            vision_feature_layer: which hidden state of the encoder is projected; None takes the configuration's word.

        Raises:
            ValueError: see `embed`.
        """
        embeds, features = self.embed(input_ids, pixel_values, image_sizes, inputs_embeds, vision_feature_layer)
        if past_key_values is None:
            check_start(input_ids, attention_mask, None, self.config.text_config, 0, 0)
        out = self.language_model(
            None, attention_mask, position_ids, past_key_values, embeds, use_cache, **kwargs
        )
        return Mistral3ModelOutputWithPast(
            out.last_hidden_state, out.past_key_values, out.hidden_states, out.attentions, features
        )


class Mistral3ForConditionalGeneration(Mistral3PreTrainedModel):
    """The whole: pictures and text in, logits over the vocabulary out."""

    may_tie = MappingProxyType({"lm_head.weight": "model.language_model.embed_tokens.weight"})

    def __init__(self, config: Mistral3Config) -> None:
        super().__init__(config)
        self.model = Mistral3Model(config)
        self.lm_head = Linear(config.text_config.hidden_size, config.text_config.vocab_size)
        self.init_head()

    def forward(
        self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0, image_sizes: ImageSizes | None = None,
        vision_feature_layer: int | None = None, **kwargs: Any,
    ) -> Mistral3CausalLMOutputWithPast:  # fmt: skip
        """The arguments of `Mistral3Model.forward`, and `labels` and `logits_to_keep` of `MinistralForCausalLM.forward`
        (raises as these)."""
        expect_labels(labels, input_ids, inputs_embeds, logits_to_keep)
        out = self.model(
            input_ids, pixel_values, attention_mask, position_ids, past_key_values, inputs_embeds,
            vision_feature_layer, use_cache, image_sizes, **kwargs,
        )  # fmt: skip
        logits, loss = logits_and_loss(self.lm_head, out.last_hidden_state, labels, logits_to_keep)
        return Mistral3CausalLMOutputWithPast(
            loss, logits, out.past_key_values, out.hidden_states, out.attentions, out.image_hidden_states
        )

"""Images for the vision model: read a file or an address, resize, normalise, and count the [IMG] tokens.

    pixels = preprocess(load_image("photo.jpg"), config)             # float32 (3, height, width)
    pixel_values, image_sizes = batch_images([pixels])
    ids = image_tokens(image_sizes[0], config, break_id, end_id)     # the tokens that stand for it in a prompt

`config` is a `vision.Mistral3Config`. This file needs no model.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
import threading
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 10**8  # of an image
STRIP = 256  # rows
MAX_BYTES = 50 * 10**6  # of its file
TIMEOUT = 20  # seconds for a download
SHORTEST_BASE64 = 40  # characters: the smallest image files, GIFs, have 35 bytes
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # others run other programs, or are rare


# ------------------------------------------------------------------------------------------------------- reading


def load_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """Read an image from a file, an address (http, https, `file:`, or `data:` with base64), base64 alone, or the bytes
    of a file. It is turned upright by its EXIF data. An image of Pillow is returned as it is.

    Raises:
        FileNotFoundError: no such file, or the address cannot be reached.
        ValueError: Pillow is missing; a source of another kind; no image in one of FORMATS, a damaged one, or
            more than MAX_PIXELS pixels.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ValueError("images need Pillow: pip install pillow") from error
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes):
        name, data = "the data", source
    elif isinstance(source, (str, os.PathLike)):
        name = _short(str(source))
        data = _read(str(source), name)
    else:
        supported = "a path, an address, the bytes of a file, or an image of Pillow's"
        raise ValueError(f"an image is given as {type(source).__name__}; supported: {supported}")
    image = _decode(data, name)
    with suppress(Exception):  # EXIF data that cannot be read turn nothing
        ImageOps.exif_transpose(image, in_place=True)  # otherwise an upright image is copied
    return image


def _short(name: str) -> str:
    """A name that fits into a message."""
    if len(name) <= 100:
        return name
    return name[:60] + "..."


def _decode(data: bytes, name: str) -> Image.Image:
    """The image that the bytes of a file hold."""
    from PIL import Image, UnidentifiedImageError

    too_large = f"{name} has more than {MAX_PIXELS // 10**6} million pixels; scale it down"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what it can still read
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            small = image.width * image.height <= MAX_PIXELS
            if small:
                image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(too_large) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is no image; supported: {', '.join(FORMATS)}") from error
    except Exception as error:  # of many kinds, one for each format and defect
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name} is damaged or no image ({reason})") from error
    if not small:
        raise ValueError(too_large)
    return image


def _read(source: str, name: str) -> bytes:
    """The bytes of an image file by its path, address or base64."""
    if source[:5].lower() == "data:":
        return _read_data_address(source, name)
    if source.lower().startswith(("http://", "https://")):
        return _download(source, name)
    try:
        path = _local_path(source)
        if path.exists() and not path.is_file():
            raise OSError("not a file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:
        decoded = _base64(source)
        if decoded is not None:
            return decoded
        reason = getattr(error, "strerror", None)
        if not reason:
            reason = error
        if not name:
            name = "an empty name"
        if re.match(r"(?!file:)[a-z][a-z0-9+.-]*://", source, re.IGNORECASE):
            reason = "supported: a file, or an address with http:, https:, file: or data:"
        raise FileNotFoundError(f"{name} cannot be read ({reason})") from error
    return _limited(data, name)


def _read_data_address(source: str, name: str) -> bytes:
    """The bytes in an address of the form data:image/png;base64,..."""
    head, _, data = source.partition(",")
    try:
        if not head.lower().rstrip().endswith(";base64"):
            raise ValueError("not base64")
        return base64.b64decode("".join(urllib.parse.unquote(data).split()), validate=True)
    except ValueError as error:
        raise ValueError(f"{name} is no data:...;base64, address of an image ({error})") from error


def _local_path(source: str) -> Path:
    """The file that a name or a `file:` address means. mistral-common reads the part after file:// as it is. Others
    encode blanks and similar characters in it."""
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
    """The bytes of a text in base64, or None if it cannot be an image. mistral-common and Transformers read it, too."""
    text = "".join(source.split())
    if len(text) < SHORTEST_BASE64:
        return None
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return None


def _limited(data: bytes, name: str) -> bytes:
    """The bytes, unless there are more than MAX_BYTES."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"{name} has more than {MAX_BYTES // 10**6} MB; scale it down")
    return data


def _download(address: str, name: str) -> bytes:
    """The bytes at a web address. They are fetched in a thread, because a slow server can keep a socket's timeout from
    firing."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())  # none for files or FTP, to which a server might redirect
    results: list[bytes | Exception] = []

    def fetch() -> None:
        try:
            with opener.open(address, timeout=TIMEOUT) as response:
                results.append(response.read(MAX_BYTES + 1))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    if not results:
        results.append(TimeoutError(f"no answer within {TIMEOUT} s"))
    answer = results[0]
    if isinstance(answer, Exception):
        reason = str(answer)
        if not reason:
            reason = type(answer).__name__
        raise FileNotFoundError(f"{name} cannot be fetched ({reason})") from answer
    return _limited(answer, name)


# -------------------------------------------------------------------------------------------------------- pixels


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple that is not below a length."""
    return -(-length // multiple) * multiple


def mistral_size(height: int, width: int, longest_edge: int, multiple: int) -> tuple[int, int]:
    """The (height, width) to which an image is resized, by the rule of mistral-common.

    It is scaled down until no edge is longer than `longest_edge`, rounded (halves to even, and at least 1), then
    rounded up to multiples of `multiple`.
    """
    ratio = max(height / longest_edge, width / longest_edge)
    if ratio > 1:
        height = max(round(height / ratio), 1)
        width = max(round(width / ratio), 1)
    return round_up(height, multiple), round_up(width, multiple)


def transformers_size(height: int, width: int, longest_edge: int, multiple: int) -> tuple[int, int]:
    """The same by the rule of Transformers, which rounds down. Of images with random edges up to 6000 pixels, 1.6 % get
    another number of patches.

    Raises:
        ValueError: nothing is left of the shorter edge.
    """
    ratio = max(height / longest_edge, width / longest_edge)
    if ratio > 1:
        height = math.floor(height / ratio)
        width = math.floor(width / ratio)
    if min(height, width) < 1:
        found = f"the image is {height} x {width}"
        raise ValueError(f"scaled to {longest_edge} pixels, {found}: no pixel is left")
    return round_up(height, multiple), round_up(width, multiple)


def preprocess(
    image: Image.Image, config: Any, rule: Callable[[int, int, int, int], tuple[int, int]] = mistral_size
) -> Tensor:
    """The pixels of an image as the encoder reads them: float32 (3, height, width), both multiples of the merged patch.

    Transparent pixels become white. The image is resized by Pillow's bicubic filter, as in Transformers (mistral-common
    uses OpenCV's). 16-bit grey is clipped to 8 bits, as there.

    Args:
        config: the `Mistral3Config`.
        rule: `mistral_size` or `transformers_size`.

    Raises:
        ValueError: not an image of Pillow's.
    """
    from PIL import Image

    if not isinstance(image, Image.Image):
        allowed = "one of Pillow's, as load_image returns it"
        raise ValueError(f"an image is a {type(image).__name__}; allowed: {allowed}")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = on_white(image)
    elif image.mode not in ("RGB", "L"):
        image = image.convert("RGB")
    vision = config.vision_config
    merged_patch = vision.patch_size * config.spatial_merge_size
    height, width = rule(image.height, image.width, vision.image_size, merged_patch)
    # Grey becomes RGB afterwards: the same numbers, and a third of the memory.
    image = image.resize((width, height), Image.Resampling.BICUBIC).convert("RGB")
    scaled = np.asarray(image, np.float32) / np.float32(255)
    x = (scaled - np.array(MEAN, np.float32)) / np.array(STD, np.float32)  # (height, width, 3)
    return torch.from_numpy(x).permute(2, 0, 1).contiguous()


def on_white(image: Image.Image) -> Image.Image:
    """An image with transparent pixels as RGB, on white. It is made in strips: a copy of a whole image takes 4 bytes a
    pixel."""
    from PIL import Image

    flat = Image.new("RGB", image.size)
    for top in range(0, image.height, STRIP):
        strip = image.crop((0, top, image.width, min(top + STRIP, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        flat.paste(Image.alpha_composite(white, strip), (0, top))
    return flat


def batch_images(images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Join images (3, h, w) of any sizes: pixel_values (N, 3, height, width), with zeros to the right and below, and
    image_sizes.

    Raises:
        ValueError: no image, or one of another kind.
    """
    if len(images) == 0:
        raise ValueError("no images to put into a batch; leave pixel_values out")
    for image in images:
        if not isinstance(image, Tensor) or image.ndim != 3:
            raise ValueError(f"an image is a {type(image).__name__}; allowed: a tensor (3, height, width)")
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    height = max(h for h, _ in sizes)
    width = max(w for _, w in sizes)
    padded = [F.pad(image, (0, width - w, 0, height - h)) for image, (h, w) in zip(images, sizes)]
    return torch.stack(padded), sizes


def image_tokens(size: tuple[int, int], config: Any, break_id: int, end_id: int) -> list[int]:
    """The ids that stand for an image of (height, width) pixels in a prompt. `config` is the `Mistral3Config`."""
    merged_patch = config.vision_config.patch_size * config.spatial_merge_size
    rows, columns = size[0] // merged_patch, size[1] // merged_patch
    row = [config.image_token_id] * columns + [break_id]
    return (row * rows)[:-1] + [end_id]


def read_image(source: Any, config: Any, tokenizer: Any) -> tuple[Tensor, list[int]]:
    """An image, preprocessed (3, height, width), and the ids that stand for it in a prompt.

    Args:
        source: see `load_image`.
        config: the `Mistral3Config`.
        tokenizer: its `special_tokens` are read.

    Raises:
        FileNotFoundError: as `load_image`.
        ValueError: the tokenizer has no such tokens, or the model has another id for [IMG]; as `load_image`.
    """
    pixels = preprocess(load_image(source), config)
    names = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    image_id, break_id, end_id = (tokenizer.special_tokens.get(name) for name in names)
    if break_id is None or end_id is None or image_id != config.image_token_id:
        present = ", ".join(f"{name} {tokenizer.special_tokens.get(name)}" for name in names)
        allowed = f"these three, [IMG] being {config.image_token_id}"
        raise ValueError(f"the tokenizer has {present}; allowed: {allowed}")
    _, height, width = pixels.shape
    return pixels, image_tokens((height, width), config, break_id, end_id)

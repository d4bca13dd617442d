"""Images: the encoder and the whole model equal Transformers', sizes and tokens equal mistral-common's."""

import base64
import dataclasses
import functools
import http.server
import io
import json
import math
import random
import re
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given, strategies as st
from mistral_common.protocol.instruct.chunk import ImageChunk, ImageURLChunk
from mistral_common.tokens.tokenizers import image as mistral_image
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import images
from chat import encode_messages
from generate import generate
from images import batch_images, image_tokens, load_image, mistral_size, preprocess, transformers_size
from ministral import KVCache
from model_types import BUNDLED, BUNDLED_2410, load_model
from tests.cases import draw_chunks, draw_config
from tests.errors import Errors, number_of_cases
from tests.published import hub_names
from tests.test_checkpoint import assert_same_weights
from tests.test_cli import run
from tests.test_generate import assert_same_tokens
from tests.test_parity import assert_same
from tokenizer import Tokenizer
from vision import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Mistral3Model,
    PixtralVisionConfig,
    PixtralVisionModel,
)

try:
    from transformers.models.pixtral import image_processing_pil_pixtral as their_images
except ImportError:  # versions that process images with torchvision only
    their_images = None

rngs = st.randoms(use_true_random=False)
needs_their_images = pytest.mark.skipif(their_images is None, reason="this Transformers has no Pillow image processor")
ROOT = Path(__file__).resolve().parent.parent
BREAK, END = 12, 13
ANSWERED = threading.Event()  # ends the slow answer of the server below


@dataclasses.dataclass
class Case:
    """Our model, Transformers' with equal weights, and a batch of texts with images."""

    ours: Mistral3ForConditionalGeneration
    theirs: object
    ids: torch.Tensor  # (B, S)
    mask: torch.Tensor | None
    pixels: torch.Tensor | None  # (N, 3, height, width)
    sizes: list[tuple[int, int]]

    def arguments(self, **others):
        """The arguments of `forward`, for either side."""
        images = {} if self.pixels is None else {"pixel_values": self.pixels, "image_sizes": self.sizes}
        return {"input_ids": self.ids, "attention_mask": self.mask} | images | others

    def truth(self):
        """Our model with the same weights in float64, eager."""
        model = Mistral3ForConditionalGeneration(dataclasses.replace(self.ours.config, attn_implementation="eager"))
        model.load_state_dict(self.ours.state_dict())
        return model.double().to(self.ids.device).eval()


def draw_case(rng, device="cpu", dtype=None, images=None, **fixed):
    """A tiny model with random values of all settings, one to three texts, and the given number of images (default 0 to
    3) in them: portrait, landscape, no multiples of the patch size, different sizes in one batch."""
    attn = fixed.pop("attn_implementation", rng.choice(["eager", "sdpa"]))
    heads, layers = rng.choice([1, 2, 3]), rng.randint(1, 3)
    vision = PixtralVisionConfig(
        hidden_size=heads * rng.choice([4, 8, 16]), intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=heads, image_size=200, patch_size=rng.choice([2, 3, 4]),
        hidden_act=rng.choice(["silu", "gelu"]), rope_theta=rng.choice([100.0, 1e4]),
    )  # fmt: skip
    # Layer 0 is left out: Transformers fails on it, because it passes the number on as "output hidden states?".
    layer = rng.choice([-1, -1, *(i for i in range(-layers - 1, layers + 1) if i)])
    config = Mistral3Config(
        vision, draw_config(rng, family="ministral3"), image_token_index=rng.choice([10, 49]),
        projector_hidden_act=rng.choice(["gelu", "silu"]), vision_feature_layer=rng.choice([layer, [layer]]),
        multimodal_projector_bias=rng.random() < 0.3, spatial_merge_size=rng.choice([1, 2, 3]),
        tie_word_embeddings=rng.random() < 0.5, attn_implementation=attn,
    )  # fmt: skip
    config = dataclasses.replace(config, **fixed)
    arguments = {k: v for k, v in config.to_dict().items() if k != "model_type"}
    their_config = transformers.Mistral3Config(**arguments)
    their_config._attn_implementation = attn
    dtype = dtype or rng.choice([torch.float32, torch.bfloat16])
    theirs = transformers.Mistral3ForConditionalGeneration._from_config(their_config, dtype=dtype)
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.4 if p.ndim > 1 else 0.3) + (p.ndim == 1))
    ours = Mistral3ForConditionalGeneration(config).to(dtype)
    ours.load_state_dict(theirs.state_dict())

    N, merged = rng.randint(0, 3) if images is None else images, config.vision_config.patch_size
    merged *= config.spatial_merge_size
    sizes = [(rng.randint(merged, 4 * merged), rng.randint(merged, 5 * merged)) for _ in range(N)]
    if N and sum((h // merged) * (w // merged) for h, w in sizes) == 1:
        sizes[0] = (2 * merged, merged)  # Transformers fails on a single embedding: it squeezes that dimension away
    words = [i for i in range(1, 49) if i != 10]
    texts = [[rng.choice(words) for _ in range(rng.randint(2, 8))] for _ in range(rng.randint(1, 3))]
    for i, size in enumerate(sizes):
        row = texts[min(i, len(texts) - 1)]
        place = rng.choice([0, len(row)])
        row[place:place] = image_tokens(size, config, BREAK, END)
    S, left = max(map(len, texts)), rng.random() < 0.5
    rows = [[0] * (S - len(row)) + row if left else row + [0] * (S - len(row)) for row in texts]
    padding_mask = [[1] * len(row) + [0] * (S - len(row)) for row in texts]
    if left:
        padding_mask = [row[::-1] for row in padding_mask]
    height, width = (max((size[i] for size in sizes), default=0) + rng.randint(0, 3) for i in (0, 1))
    pixels = torch.randn(N, 3, height, width, generator=g).to(device, dtype) if N else None
    mask = None if all(map(all, padding_mask)) else torch.tensor(padding_mask, device=device)
    pair = (model.to(device).eval() for model in (ours, theirs))
    return Case(*pair, torch.tensor(rows, device=device), mask, pixels, sizes)


def padding_mask_of(case):
    return torch.ones_like(case.ids, dtype=torch.bool) if case.mask is None else case.mask.bool()


def image_embeddings(out):
    """The embeddings of all images (N, D) in either side's result, None without images. From 5.24 on Transformers has
    them in `image_outputs`, a tensor for each image."""
    if not hasattr(out, "image_outputs"):
        return out.image_hidden_states
    return None if out.image_outputs is None else torch.cat(out.image_outputs.pooler_output)


# ------------------------------------------------------------------------------------------------------ parity


@torch.no_grad()
@given(rngs)
def test_one_image_is_bit_identical(device, rng):
    """Every hidden state of the encoder, the embeddings, every hidden state of the language model, logits and loss."""
    case = draw_case(rng, device, images=rng.choice([0, 1, 1, 1]))
    if device == "cuda" and case.ours.config.attn_implementation == "sdpa":
        return
    padding_mask, labels = padding_mask_of(case), case.ids.masked_fill(~padding_mask_of(case), -100)
    labels[:, 1:][~(padding_mask[:, 1:] & padding_mask[:, :-1])] = -100
    sizes = torch.tensor(case.sizes) if rng.random() < 0.5 and case.sizes else case.sizes
    others = dict(labels=labels, output_hidden_states=True) | ({"image_sizes": sizes} if case.sizes else {})
    a, b = case.ours(**case.arguments(**others)), case.theirs(**case.arguments(**others))
    if case.sizes:
        x, y = (
            model.model.vision_tower(case.pixels, image_sizes=sizes, output_hidden_states=True)
            for model in (case.ours, case.theirs)
        )
        assert len(x.hidden_states) == len(y.hidden_states)
        for one, other in zip((x.last_hidden_state, *x.hidden_states), (y.last_hidden_state, *y.hidden_states)):
            assert_same(one, other)
        assert_same(image_embeddings(a), image_embeddings(b))
        whole = case.pixels[:, :, : case.sizes[0][0], : case.sizes[0][1]]
        assert_same(case.ours.model.vision_tower(whole).last_hidden_state, case.theirs.model.vision_tower(whole)[0])
    else:
        assert image_embeddings(a) is None and image_embeddings(b) is None
    for one, other in zip(a.hidden_states, b.hidden_states, strict=True):
        assert_same(one, other, padding_mask)
    assert_same(a.logits, b.logits, padding_mask)
    assert torch.equal(a.loss, b.loss) or b.loss.isnan()


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", [pytest.param("eager", marks=pytest.mark.slow), "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_images_are_no_further_from_float64(device, dtype, attn_implementation, capsys):
    """Transformers attends over one long masked sequence, ours image by image: other sums, so other last bits. The
    errors of the embeddings against float64 are compared by the criterion of tests/errors.py."""
    errors = Errors()
    for seed in range(number_of_cases(120)):
        rng = random.Random(seed)
        case = draw_case(rng, device, dtype, images=2 + seed % 2, attn_implementation=attn_implementation)
        exact = torch.cat(case.truth().model.get_image_features(case.pixels.double(), case.sizes))
        ours, theirs = (image_embeddings(model(**case.arguments())) for model in (case.ours, case.theirs))
        errors.add(ours, theirs, exact)
    with capsys.disabled():
        print(f"\n{device} {dtype} {attn_implementation}, several images: {errors}", end=" ")
    assert errors.no_larger, errors


@torch.no_grad()
def test_the_hidden_state_before_the_first_layer():
    """vision_feature_layer 0, on which Transformers fails."""
    case = draw_case(random.Random(5), dtype=torch.float32, images=1)
    states = case.ours.model.vision_tower(case.pixels, case.sizes, output_hidden_states=True).hidden_states
    grids = case.ours.model.vision_tower.grids(case.pixels, case.sizes)
    expected = case.ours.model.multi_modal_projector(states[0][0], grids)
    for layer in (0, -case.ours.config.vision_config.num_hidden_layers - 1):
        features = case.ours.model.get_image_features(case.pixels, case.sizes, vision_feature_layer=layer)
        assert torch.cat(features).equal(expected)


@torch.no_grad()
@given(rngs)
def test_images_do_not_see_each_other(device, rng):
    """In float64, images in one batch, without their padding, and one by one have the same embeddings, to 1e-12. They
    are nearly those of Transformers, which uses the mask of our docstring."""
    case = draw_case(rng, device, torch.float32, images=rng.randint(2, 3))
    model = case.truth().model
    model.vision_tower.config.attn_implementation = rng.choice(["eager", "sdpa"])
    together = model.get_image_features(case.pixels.double(), case.sizes)
    for features, pixels, (h, w) in zip(together, case.pixels.double(), case.sizes, strict=True):
        alone = model.get_image_features(pixels[None, :, :h, :w])[0]
        torch.testing.assert_close(features, alone, rtol=1e-12, atol=1e-12)
    case.theirs.double()
    their_features = image_embeddings(case.theirs(**case.arguments(pixel_values=case.pixels.double())))
    torch.testing.assert_close(torch.cat(together), their_features, rtol=1e-2, atol=1e-3)  # float32 in its norms


@given(rngs)
def test_the_gradient_of_every_parameter_is_bit_identical(rng):
    """One image, float32, CPU. Gradient checkpointing has no cache, and gives the gradients of a run without one."""
    case = draw_case(rng, dtype=torch.float32, images=1)
    labels = {"labels": case.ids.masked_fill(~padding_mask_of(case), -100)}
    results = []
    runs = ((case.theirs, {}, False), (case.ours, {}, False),
            (case.ours, {"use_cache": False}, False), (case.ours, {}, True))  # fmt: skip
    for model, others, checkpointing in runs:
        model.train().zero_grad()
        if model is case.ours:
            model.gradient_checkpointing = checkpointing
        loss = model(**case.arguments(**labels, **others)).loss
        if loss.isnan():
            return
        loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for one, other in (results[:2], results[2:]):
        for name, gradient in one.items():
            assert (gradient is None) == (other[name] is None), name  # layers above the one that is read have none
            assert gradient is None or torch.equal(gradient, other[name]), name


# ------------------------------------------------------------------------------------------------- cache, loop


@torch.no_grad()
@given(rngs)
def test_decoding_after_images_and_chunks_within_them(device, rng):
    """In float64, all results equal those of the whole text: any chunks, single tokens after images, rows without
    images."""
    case = draw_case(rng, device, torch.float32)
    model, pixels = case.truth(), None if case.pixels is None else case.pixels.double()
    model.config.text_config.attn_implementation = rng.choice(["eager", "sdpa"])
    images = {} if pixels is None else {"pixel_values": pixels, "image_sizes": case.sizes}
    whole = model(case.ids, attention_mask=case.mask, **images, use_cache=False).logits
    embeds, _ = model.model.embed(case.ids, pixels, case.sizes)
    cache, start, logits = KVCache(model.config.text_config), 0, []
    for length in draw_chunks(rng, case.ids.shape[1]):
        end = start + length
        mask = None if case.mask is None else case.mask[:, :end]
        out = model(inputs_embeds=embeds[:, start:end], attention_mask=mask, past_key_values=cache, use_cache=True)
        logits.append(out.logits)
        start = end
    padding_mask = padding_mask_of(case)
    torch.testing.assert_close(torch.cat(logits, 1)[padding_mask], whole[padding_mask], rtol=1e-12, atol=1e-12)


@torch.no_grad()
@given(rngs)
def test_greedy_continuations_are_transformers(rng):
    case = draw_case(rng, dtype=torch.float32, images=1, attn_implementation="eager")
    row = next(i for i, ids in enumerate(case.ids) if (ids == case.ours.config.image_token_id).any())
    ids = case.ids[row][padding_mask_of(case)[row]][None]
    images = {"pixel_values": case.pixels, "image_sizes": case.sizes}
    images["prefill_chunk_size"] = rng.choice([1, 3, 512])
    ours = generate(case.ours, ids, max_new_tokens=8, eos_token_id=(), **images)
    theirs = case.theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None,
        pixel_values=case.pixels, image_sizes=torch.tensor(case.sizes), pad_token_id=0,
    )  # fmt: skip
    padding_mask = torch.ones_like(ids, dtype=torch.bool)
    images = {"pixel_values": case.pixels, "image_sizes": torch.tensor(case.sizes)}
    assert_same_tokens((case.ours, case.theirs), case.truth(), ids, padding_mask, (ours, theirs), **images)


# ---------------------------------------------------------------------------------------------------- images

sides = st.one_of(st.integers(1, 6000), st.integers(1, 60))
PUBLISHED = Mistral3Config()


class Sized:
    """An image that has only a size."""

    def __init__(self, height, width):
        self.size, self.width, self.height = (width, height), width, height


@example(57, 3080)  # 28.5 pixels, rounded to the even 28: one row of patches instead of two
@given(sides, sides)
def test_sizes_and_tokens_are_mistral_commons(height, width):
    special = mistral_image.SpecialImageIDs(10, 12, 13)
    encoder = mistral_image.ImageEncoder(mistral_image.ImageConfig(14, 1540, 2), special)
    columns, rows = encoder._image_to_num_tokens(Sized(height, width))
    size = mistral_size(height, width, 1540, 28)
    assert size == (28 * rows, 28 * columns)
    expected = ([10] * columns + [12]) * rows
    assert image_tokens(size, PUBLISHED, 12, 13) == expected[:-1] + [13]


def test_tokens_are_mistral_commons_own(monkeypatch):
    """The same with its whole encoder (whose resampling needs OpenCV)."""
    from mistral_common.protocol.instruct.chunk import ImageChunk

    monkeypatch.setattr(mistral_image, "transform_image", lambda image, size: np.zeros((3, size[1], size[0])))
    special = mistral_image.SpecialImageIDs(10, 12, 13)
    encoder = mistral_image.ImageEncoder(mistral_image.ImageConfig(14, 1540, 2), special)
    for width, height in ((1, 1), (500, 300), (28, 29), (1600, 3000), (40, 6000)):
        encoded = encoder(ImageChunk(image=Image.new("RGB", (width, height))))
        pixels = preprocess(Image.new("RGB", (width, height)), PUBLISHED)
        assert pixels.shape == encoded.image.shape
        assert image_tokens(tuple(pixels.shape[1:]), PUBLISHED, 12, 13) == encoded.tokens


def test_the_four_tokens_of_transformers_own_test():
    """An image that is not square, with patches of 128 pixels."""
    config = Mistral3Config(PixtralVisionConfig(patch_size=128), spatial_merge_size=2)
    for rule in (mistral_size, transformers_size):
        size = tuple(preprocess(Image.new("RGB", (316, 500)), config, rule).shape[1:])
        assert image_tokens(size, config, BREAK, END).count(10) == 4


@needs_their_images
@given(sides, sides)
def test_sizes_are_transformers_where_it_has_one(height, width):
    blank = np.broadcast_to(np.zeros((3, 1, 1), np.uint8), (3, height, width))
    size = their_images.get_resize_output_image_size(blank, (1540, 1540), (28, 28), "channels_first")
    if min(size) == 0:
        with pytest.raises(ValueError, match="no pixel is left"):
            transformers_size(height, width, 1540, 28)
    else:
        assert transformers_size(height, width, 1540, 28) == size


def test_the_two_rules_differ():
    """As often as documented, and never by more than one merged patch."""
    rng, differ, total = random.Random(0), 0, 20_000
    for _ in range(total):
        height, width = rng.randint(1, 6000), rng.randint(1, 6000)
        one = mistral_size(height, width, 1540, 28)
        try:
            other = transformers_size(height, width, 1540, 28)
        except ValueError:
            other = (0, 0)
        differ += one != other
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 28 or other == (0, 0)
    assert differ / total == pytest.approx(0.016, abs=0.003)
    assert mistral_size(3491, 510, 1540, 28)[1] == 28 * 9 and transformers_size(3491, 510, 1540, 28)[1] == 28 * 8
    assert mistral_size(5383, 2, 1540, 28) == (1540, 28)


def draw_image(rng, modes=("RGB", "L", "RGBA", "P", "LA", "1", "CMYK")):
    width, height = rng.randint(1, 90), rng.randint(1, 90)
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(rng.choice(modes))


@needs_their_images
@given(rngs)
def test_pixels_are_transformers(rng):
    """Several images in one batch, all modes: bit-identical values and sizes."""
    patch, merge, edge = rng.choice([4, 14]), rng.choice([1, 2]), rng.choice([32, 56, 1540])
    config = Mistral3Config(PixtralVisionConfig(patch_size=patch, image_size=edge), spatial_merge_size=merge)
    processor = their_images.PixtralImageProcessorPil(size={"longest_edge": edge}, patch_size=patch * merge)
    modes = ["RGB", "L", "P", "1", "CMYK"]
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23):  # older ones leave what is transparent
        modes += ["RGBA", "LA"]
    images = [draw_image(rng, modes) for _ in range(rng.randint(1, 3))]
    try:
        ours, sizes = batch_images([preprocess(image, config, transformers_size) for image in images])
    except ValueError:  # Transformers has no grid for these
        return
    theirs = processor(images, patch_size={"height": patch * merge, "width": patch * merge}, return_tensors="pt")
    assert sizes == [tuple(size) for size in theirs["image_sizes"].tolist()]
    assert ours.dtype == theirs["pixel_values"].dtype and torch.equal(ours, theirs["pixel_values"])


def test_transparent_pixels_become_white():
    clear = preprocess(Image.new("RGBA", (28, 28), (0, 0, 0, 0)), PUBLISHED)
    assert clear.equal(preprocess(Image.new("RGB", (28, 28), "white"), PUBLISHED))
    palette = Image.new("P", (28, 28), 0)
    palette.info["transparency"] = 0
    assert preprocess(palette, PUBLISHED).equal(clear)


# --------------------------------------------------------------------------------------------------- bad input


def png(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def test_sources_of_images(tmp_path, monkeypatch):
    image = draw_image(random.Random(0), ["RGB"])
    (tmp_path / "a.png").write_bytes(png(image))
    uri = "data:image/png;base64," + base64.b64encode(png(image)).decode()
    wrapped = uri.replace("data:image/png;", "DATA:image/png;charset=utf-8;")[:-9] + "\n " + uri[-9:-1] + "%3D"
    assert uri.endswith("=") or uri[-1].isalnum()
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), png(image), uri, image]
    for source in (*sources, *([wrapped] if uri.endswith("=") else [])):
        assert load_image(source).tobytes() == image.tobytes()
    (tmp_path / "a b%.png").write_bytes(png(image))
    (tmp_path / "c%20d.png").write_bytes(png(image))
    addresses = [(tmp_path / name).as_uri() for name in ("a.png", "a b%.png", "c%20d.png")]
    addresses += [f"file://{tmp_path / name}" for name in ("a.png", "a b%.png", "c%20d.png")]
    addresses += [f"FILE://localhost{tmp_path}/a.png", f"file://localhost{tmp_path}/a%20b%25.png"]
    plain = base64.b64encode(png(image)).decode()
    lines = base64.encodebytes(png(image)).decode()
    for source in (*addresses, plain, lines, f"data:image;base64,{plain}"):
        assert load_image(source).tobytes() == image.tobytes(), source
    turned = Image.new("RGB", (20, 10), "red")
    exif = turned.getexif()
    exif[0x0112] = 6  # held sideways
    turned.save(tmp_path / "b.jpg", exif=exif)
    assert load_image(tmp_path / "b.jpg").size == (10, 20)
    # Some EXIF data cannot be written again after turning: the image is good for all that.
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda _: struct.pack("H", -1))
    assert load_image(tmp_path / "b.jpg").size == (20, 10)


@pytest.mark.parametrize("key", ["image", "url", "path", "base64", "image_url", "image_url url"])
def test_images_in_messages_are_those_of_transformers_and_mistral_common(tmp_path, key):
    """Every form of a part gives the same pixels."""
    image = draw_image(random.Random(0), ["RGB"])
    (tmp_path / "a b.png").write_bytes(png(image))
    plain, name = base64.b64encode(png(image)).decode(), str(tmp_path / "a b.png")
    sources = [plain] if key == "base64" else [name, (tmp_path / "a b.png").as_uri(), plain]
    tokenizer, seen = Tokenizer.from_dir(BUNDLED, "v7"), []

    def see(source):
        seen.append(source)
        return [10]

    for source in [*sources, f"data:image/png;base64,{plain}"]:
        part = {"type": "image", key: source}
        if "image_url" in key:
            part = {"type": "image_url", "image_url": {"url": source} if "url " in key else source}
        seen.clear()
        tokenizer.encode_chat([{"role": "user", "content": [part]}], None, see)
        assert load_image(seen[0]).tobytes() == image.tobytes()
        if not source.startswith("file:"):
            assert transformers.image_utils.load_image(source).tobytes() == image.tobytes()
        if source.startswith("data:") or (source == plain and key == "image"):
            chunk = ImageChunk(image=source) if source == plain else ImageURLChunk(image_url=source)
            assert mistral_image.image_from_chunk(chunk).tobytes() == image.tobytes()
    chunk = ImageURLChunk(image_url=f"file://{name}")
    assert mistral_image.image_from_chunk(chunk).tobytes() == load_image(f"file://{name}").tobytes()


@pytest.fixture
def server(tmp_path):
    """A server for the files of a directory, which sends wrong answers on request."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            if self.path == "/slow":  # a byte now and then, which no time-out of a socket notices
                self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
                while not ANSWERED.wait(0.1):  # until the test is over
                    self.wfile.write(b"x")
            elif self.path == "/garbage":
                self.wfile.write(b"nonsense\r\n\r\n")
            elif self.path == "/redirect":
                self.send_response(302)
                self.send_header("Location", "file:///etc/hostname")
                self.end_headers()
            else:
                super().do_GET()

    handler = functools.partial(Handler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", tmp_path
        running.shutdown()


def test_images_from_the_web(server, monkeypatch):
    address, directory = server
    image = draw_image(random.Random(1), ["RGB"])
    (directory / "a.png").write_bytes(png(image))
    assert load_image(f"{address}/a.png").tobytes() == image.tobytes()
    with pytest.raises(FileNotFoundError, match=r"cannot be fetched .*404"):
        load_image(f"{address}/b.png")
    for wrong in ("/garbage", "/redirect"):
        with pytest.raises(FileNotFoundError, match="cannot be fetched"):
            load_image(address + wrong)
    with pytest.raises(FileNotFoundError, match="cannot be fetched"):
        load_image("http://localhost:abc/x")
    monkeypatch.setattr(images, "TIMEOUT", 0.5)
    ANSWERED.clear()
    with pytest.raises(FileNotFoundError, match=r"no answer within 0\.5 s"):
        load_image(f"{address}/slow")  # ends, although the answer does not
    ANSWERED.set()
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    for source in (f"{address}/a.png", directory / "a.png"):
        with pytest.raises(ValueError, match="has more than 0 MB"):
            load_image(source)
    with pytest.raises(FileNotFoundError, match="cannot be fetched"):
        load_image("http://127.0.0.1:9/a.png")


def bomb(edge):
    """The header of a PNG of edge x edge pixels."""
    data = bytearray(png(Image.new("L", (8, 8))))
    header = b"IHDR" + edge.to_bytes(4, "big") * 2 + bytes(data[24:29])
    data[12:33] = header + zlib.crc32(header).to_bytes(4, "big")
    return bytes(data)


BAD_FILES = [
    (b"", "is no image; supported: PNG, JPEG"),
    (b"GIF89a", r"is damaged or no image \(|is no image; supported"),
    (b"not an image", "is no image; supported: PNG, JPEG"),
    (png(draw_image(random.Random(3), ["RGB"]))[:-400], r"is damaged or no image \(OSError"),
    (b"P6\n3 \xc30\n255\n", r"is damaged or no image \(ValueError"),
    (bomb(12_000), "has more than 100 million pixels; scale it down"),  # above our limit, below Pillow's
    (bomb(60_000), "has more than 100 million pixels; scale it down"),
]
BAD_NAMES = ["empty", "header", "text", "truncated", "number", "large", "bomb"]


@pytest.mark.parametrize("data, message", BAD_FILES, ids=BAD_NAMES)
def test_bad_images(tmp_path, data, message):
    (tmp_path / "bad.png").write_bytes(data)
    for source in (tmp_path / "bad.png", data):
        with pytest.raises(ValueError, match=message):
            load_image(source)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "PA", "1", "CMYK", "I;16", "transparent P"])
def test_copies_that_are_saved_change_no_pixel(monkeypatch, mode):
    """Grey is resized as grey, and transparent images are laid on white in strips."""
    monkeypatch.setattr(images, "STRIP", 7)
    config = Mistral3Config(vision_config={"patch_size": 4, "image_size": 32})
    pixels = np.random.default_rng(0).integers(0, 256, (45, 60, 4), np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 3)
    elif mode == "transparent P":
        image = image.convert("P")
        image.info["transparency"] = 3
    else:
        image = image.convert("RGB").convert(mode) if mode not in ("RGBA", "LA", "PA") else image.convert(mode)
    whole = image
    if "A" in image.getbands() or "transparency" in image.info:
        whole = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    whole = whole.convert("RGB")
    assert preprocess(image, config).equal(preprocess(whole, config))


def test_an_upright_image_is_not_copied(monkeypatch):
    """An image of 100 million pixels takes 400 MB."""
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "PNG")
    monkeypatch.setattr(Image.Image, "copy", None)
    assert load_image(file.getvalue()).size == (9, 9)


def test_bad_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png cannot be read \(No such file"):
        load_image(tmp_path / "none.png")
    for wrong in (tmp_path, "/dev/null", "", "~nobody-of-this-name/a.png", "a\0b"):
        with pytest.raises(FileNotFoundError, match="cannot be read"):
            load_image(wrong)
    with pytest.raises(FileNotFoundError, match=r"ftp://a/b\.png cannot be read \(supported: a file, or an address"):
        load_image("ftp://a/b.png")
    names = ["file:///no/such.png", "file://other/a.png", "file://", "file:///a\0b", f"file://{tmp_path}"]
    for wrong in (*names, "A" * 36):
        with pytest.raises(FileNotFoundError, match="cannot be read"):
            load_image(wrong)
    with pytest.raises(ValueError, match="is no image; supported"):
        load_image("A" * 400)  # base64 of no image
    for wrong in (5, None, [1], {"url": "a"}, torch.zeros(3, 4, 4), np.zeros((4, 4, 3))):
        with pytest.raises(ValueError, match=f"given as {type(wrong).__name__}; supported: a path"):
            load_image(wrong)
    with pytest.raises(ValueError, match="no images to put into a batch"):
        batch_images([])
    for uri in ("data:image/png;base64,!!!", "data:image/png,abc", "data:"):
        with pytest.raises(ValueError, match="is no data:"):
            load_image(uri)


@torch.no_grad()
def test_counts_of_images_that_differ():
    case = draw_case(random.Random(1), dtype=torch.float32, images=1)
    count = int((case.ids == case.ours.config.image_token_id).sum())
    fewer = case.ids.clone()
    fewer[fewer == case.ours.config.image_token_id] = 5
    with pytest.raises(ValueError, match=rf"^0 \[IMG\] tokens \(id \d+\) for images that have {count} embeddings"):
        case.ours(**case.arguments(input_ids=fewer))
    for wrong, message in (
        ({"pixel_values": case.pixels[0]}, "pixel_values must be (images, 3, height, width); found (3, "),
        ({"image_sizes": case.sizes * 2}, "image_sizes must be a (height, width) for each of 1 images; found"),
        ({"image_sizes": [(1000, 4)]}, "an image size of 1000 x 4; allowed:"),
        ({"image_sizes": [(0, 8)]}, "an image size of 0 x 8; allowed:"),
        ({"image_sizes": [(8.5, 8)]}, "image_sizes must be a (height, width)"),
        ({"image_sizes": [8]}, "image_sizes must be a (height, width)"),
        ({"image_sizes": [("a", 8)]}, "image_sizes must be a (height, width)"),
        ({"image_sizes": [(None, 8)]}, "image_sizes must be a (height, width)"),
        ({"image_sizes": [(math.inf, 8)]}, "image_sizes must be a (height, width)"),
        ({"pixel_values": case.pixels[:0]}, "pixel_values hold no image"),
        ({"vision_feature_layer": 99}, "vision_feature_layer=99 is impossible; allowed: one number from -"),
        ({"vision_feature_layer": [-1, -2]}, "vision_feature_layer=[-1, -2] is impossible"),
        ({"logits_to_keep": -1}, "logits_to_keep=-1 is impossible"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            case.ours(**case.arguments(**wrong))
    with pytest.raises(ValueError, match="allowed: 3 x 3 or more"):
        Mistral3Model(dataclasses.replace(case.ours.config, spatial_merge_size=3)).get_image_features(
            torch.zeros(1, 3, 2 * case.ours.config.vision_config.patch_size, 40)
        )
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        case.ours(pixel_values=case.pixels)
    text_only = load_model(BUNDLED_2410)
    with pytest.raises(ValueError, match="pixel_values for a MinistralForCausalLM, a text model"):
        generate(text_only, torch.tensor([[1]]), pixel_values=case.pixels)


@torch.no_grad()
def test_pixels_are_cast_to_the_weights():
    case = draw_case(random.Random(0), dtype=torch.bfloat16, images=1)
    for dtype in (torch.float32, torch.float64):
        cast = case.arguments(pixel_values=case.pixels.to(dtype))
        assert_same(case.ours(**cast).logits, case.ours(**case.arguments()).logits)


@torch.no_grad()
def test_images_among_given_embeddings():
    case = draw_case(random.Random(1), dtype=torch.float32, images=1)
    embeds = case.ours.model.language_model.embed_tokens(case.ids)
    given_embeds = case.ours(**case.arguments(input_ids=None, inputs_embeds=embeds)).logits
    assert_same(given_embeds, case.ours(**case.arguments()).logits)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vision_config": {"hidden_size": 10, "num_attention_heads": 4}}, "hidden_size=10 is impossible"),
        ({"vision_config": {"patch_size": 0}}, "patch_size=0 is impossible; allowed: a whole number from 1 to"),
        ({"vision_config": {"head_dim": 3}}, "head_dim=3 is impossible; allowed: hidden_size / num_attention_heads"),
        ({"vision_config": {"rope_parameters": {"rope_type": "yarn"}}}, "allowed: rope_type default or axial"),
        ({"vision_config": {"model_type": "clip"}}, "model_type 'clip' computes another function; allowed: pixtral"),
        ({"text_config": {"model_type": "gemma"}}, "allowed: model_type ministral3, ministral, mistral"),
        ({"text_config": {"model_type": ["gemma"]}}, "allowed: model_type ministral3, ministral, mistral"),
        ({"vision_feature_layer": 25}, "vision_feature_layer=25 is impossible; allowed: one number from -25 to 24"),
        ({"vision_feature_layer": [-1, -2]}, "allowed: one number"),
        ({"vision_config": [1]}, "vision_config=[1] is impossible; allowed: an object"),
        ({"vision_config": {"hidden_act": ["silu"]}}, "hidden_act=['silu'] is impossible; allowed: "),
        ({"vision_config": {"initializer_range": "x"}}, "initializer_range='x' is impossible"),
        ({"vision_config": {"rope_parameters": {"factor": 2.0}}}, "allowed: keys rope_type, rope_theta"),
        ({"vision_config": {"rope_parameters": {"rope_type": "default", "type": "linear"}}}, "that agree"),
        ({"text_config": "abc"}, "text_config='abc' is impossible; allowed: an object"),
        ({"projector_hidden_act": ["gelu"]}, "projector_hidden_act="),
        ({"spatial_merge_size": 0}, "spatial_merge_size=0 is impossible"),
        ({"image_token_index": 10**6}, "allowed: an id of the vocabulary"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized weights (gptq) are not supported"),
    ],
)
def test_impossible_configurations(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Mistral3Config.from_dict({"model_type": "mistral3"} | change)


# ------------------------------------------------------------------------------------------------------- files


@pytest.mark.slow
@torch.no_grad()
@given(rngs)
def test_directories_go_both_ways(tmp_path_factory, rng):
    case = draw_case(rng, images=1)
    ours, theirs = (tmp_path_factory.mktemp(side) for side in ("ours", "theirs"))
    attn = case.ours.config.attn_implementation
    case.ours.save_pretrained(ours)
    case.theirs.save_pretrained(theirs)
    there, info = transformers.Mistral3ForConditionalGeneration.from_pretrained(
        ours, output_loading_info=True, attn_implementation=attn
    )
    assert not any(info.values()), info
    here = load_model(theirs, attn_implementation=attn)
    assert_same_weights(case.ours, here)
    assert_same_weights(case.ours, there)
    again = load_model(ours, attn_implementation=attn)
    assert again.config == case.ours.config
    assert_same(again(**case.arguments()).logits, there(**case.arguments()).logits, padding_mask_of(case))
    backbone = Mistral3Model.from_pretrained(theirs)
    assert_same_weights(backbone, case.ours.model)
    for source in (case.ours, case.theirs):  # the encoder alone
        source.model.vision_tower.save_pretrained(theirs / "tower")
        assert_same_weights(PixtralVisionModel.from_pretrained(theirs / "tower"), case.ours.model.vision_tower)


def test_the_names_of_the_published_files(tmp_path):
    """language_model.model.layers, language_model.lm_head, vision_tower, multi_modal_projector."""
    case = draw_case(random.Random(4), tie_word_embeddings=False)
    case.ours.save_pretrained(tmp_path)
    hub_names(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "language_model.lm_head.weight" in tensors and "language_model.model.norm.weight" in tensors
    assert_same_weights(load_model(tmp_path), case.ours)


def test_configurations_of_transformers(recwarn):
    """They are read without a warning, with any defaults and both names of the image token. Weights are tied by
    default."""
    assert Mistral3Config.from_dict(transformers.Mistral3Config().to_dict()).vision_config.hidden_act == "gelu"
    assert Mistral3Config.from_dict({"image_token_id": 11}).image_token_index == 11
    text = {"model_type": "ministral3", "num_hidden_layers": 1}
    assert Mistral3Config(text_config=text).tie_word_embeddings
    assert not Mistral3Config(text_config=text | {"tie_word_embeddings": False}).tie_word_embeddings
    assert not Mistral3Config(text_config=text, tie_word_embeddings=False).tie_word_embeddings
    assert not Mistral3Config().tie_word_embeddings
    assert not recwarn.list


def test_the_published_model_has_the_published_size():
    """3B: numbers in the language model, the encoder and the projector."""
    text = {"model_type": "ministral3", "hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 26,
            "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}  # fmt: skip
    with torch.device("meta"):
        model = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text)).model
    parts = [model.language_model, model.vision_tower, model.multi_modal_projector]
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [3_429_006_336, 403_305_472, 16_778_240]


# ------------------------------------------------------------------------------------------------------ memory


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest result of any operation."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@torch.no_grad()
def test_no_tensor_is_quadratic_in_the_images():
    """Eight images of 256 patches: nothing as large as 2048 x 2048, and on the fused path nothing as large as
    256 x 256 for all heads."""
    config = PixtralVisionConfig(16, 16, 2, 2, image_size=64, patch_size=4)
    for attn, limit in (("eager", 2 * 256 * 256), ("sdpa", 8 * 3 * 64 * 64)):
        model = PixtralVisionModel(dataclasses.replace(config, attn_implementation=attn)).eval()
        with Largest() as largest:
            model(torch.zeros(8, 3, 64, 64))
        assert largest.numel <= limit, attn


# ------------------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def vision_directory(tmp_path_factory):
    """A directory with a tiny vision model and the bundled tokenizer, and an image."""
    path = tmp_path_factory.mktemp("vision")
    text = {"model_type": "ministral3", "vocab_size": 2304, "hidden_size": 32, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
            "max_position_embeddings": 512}  # fmt: skip
    vision = PixtralVisionConfig(16, 16, 2, 2, image_size=64, patch_size=4)
    torch.manual_seed(0)
    Mistral3ForConditionalGeneration(Mistral3Config(vision, text)).save_pretrained(path)
    shutil.copy(BUNDLED / "tekken.json", path)
    draw_image(random.Random(0), ["RGB"]).save(path / "a.png")
    return path


def test_the_command_reads_images(capsys, vision_directory):
    options = ["--model", str(vision_directory), "--max-new-tokens", "4", "--temperature", "0", "--json"]
    image = str(vision_directory / "a.png")
    code, out, err = run(capsys, "What is this?", "--image", image, "--image", image, *options)
    assert code == 0, err
    result = json.loads(out)
    config = Mistral3Config.from_dict(json.loads((vision_directory / "config.json").read_text()))
    size = tuple(preprocess(Image.open(vision_directory / "a.png"), config).shape[1:])
    tokens = image_tokens(size, config, BREAK, END)
    assert result["prompt_ids"][: 1 + 2 * len(tokens)] == [1, *tokens, *tokens]
    plain = json.loads(run(capsys, "What is this?", *options)[1])
    assert plain["prompt_ids"][1:] == result["prompt_ids"][1 + 2 * len(tokens) :] and len(result["ids"]) <= 4
    model = load_model(vision_directory)
    pixels, sizes = batch_images([preprocess(Image.open(vision_directory / "a.png"), config)] * 2)
    ids = torch.tensor([result["prompt_ids"]])
    out = generate(model, ids, max_new_tokens=4, pixel_values=pixels, image_sizes=sizes)
    assert out[0, ids.shape[1] :].tolist() == result["ids"]


def test_messages_with_images(vision_directory):
    """A conversation with a file and a data: URI has the ids of its parts, and the model can answer it."""
    config = Mistral3Config.from_dict(checkpoint.read_config(vision_directory))
    tokenizer = Tokenizer.from_dir(vision_directory)
    uri = "data:image/png;base64," + base64.b64encode((vision_directory / "a.png").read_bytes()).decode()
    parts = [{"type": "image", "image": str(vision_directory / "a.png")}, {"type": "text", "text": "and"},
             {"type": "image_url", "image_url": {"url": uri}}]  # fmt: skip
    ids, pixels, sizes = encode_messages([{"role": "user", "content": parts}], tokenizer, config)
    image = preprocess(load_image(vision_directory / "a.png"), config)
    tokens = image_tokens(tuple(image.shape[1:]), config, BREAK, END)
    assert ids[0].tolist() == [1, 3, *tokens, *tokenizer.encode("and", bos=False), *tokens, 4]
    assert pixels.equal(torch.stack([image, image])) and sizes == [tuple(image.shape[1:])] * 2
    out = generate(load_model(vision_directory), ids, max_new_tokens=3, pixel_values=pixels, image_sizes=sizes)
    assert out.shape[1] > ids.shape[1]
    text = [{"role": "user", "content": "and"}]
    assert encode_messages(text, tokenizer, config)[1:] == (None, None)
    with pytest.raises(ValueError, match="an image, for a text model"):
        encode_messages([{"role": "user", "content": parts}], tokenizer, config.text_config)


@pytest.mark.parametrize("data, message", BAD_FILES, ids=BAD_NAMES)
def test_the_command_refuses_bad_images(capsys, vision_directory, tmp_path, data, message):
    (tmp_path / "bad.png").write_bytes(data)
    code, out, err = run(capsys, "x", "--model", vision_directory, "--image", tmp_path / "bad.png")
    assert code == 2 and out == "" and "Traceback" not in err
    assert re.fullmatch(rf"error: .*({message}).*\n", err)


def test_the_command_without_pillow(vision_directory, tmp_path):
    (tmp_path / "PIL.py").write_text("raise ImportError('no Pillow')")
    program = "import sys; sys.path.insert(0, sys.argv.pop(1)); import generate; sys.exit(generate.main())"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), "x", "--model", str(vision_directory),
         "--image", str(vision_directory / "a.png")],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: images need Pillow: pip install pillow\n")


def test_the_command_with_a_text_model(capsys, vision_directory):
    code, out, err = run(capsys, "x", "--model", BUNDLED_2410, "--image", vision_directory / "a.png")
    assert code == 2 and out == ""
    message = f"{BUNDLED_2410} is a text model (model_type 'ministral'); give a --model that is a vision model"
    assert err == f"error: --image {vision_directory / 'a.png'}: {message} (model_type 'mistral3')\n"
    code, _, err = run(capsys, "x", "--model", vision_directory, "--image", vision_directory / "none.png")
    assert code == 2 and "none.png cannot be read" in err and err.count("\n") == 1

"""Build and check the golden traces.

They are three tiny models in which every feature takes effect within 20 tokens: their weights as Transformers and
Mistral write them, and everything they compute in float64, float32 and bfloat16.

    reference/golden/ministral/       windows: full, sliding (5 keys), sliding; two texts, the second padded on the left
    reference/golden/ministral3/      YaRN with all three zones, queries scaled from position 8 on; the same texts
    reference/golden/mistral3/        the vision model: one text with two images of different sizes

        float64.safetensors  float32.safetensors  bfloat16.safetensors      traces; float64 is the reference
        hf/        weights in Transformers' layout, as float32, which NumPy reads; all are bfloat16 numbers
        mistral/   the same in Mistral's layout, as bfloat16, which is how both are published
        fp8/       another model, hf/ in FP8, and float64.safetensors and bfloat16.safetensors: its input and logits

    tolerances.json      how exact a right port is at every stage
    compare.py           a comparison with the traces that needs no PyTorch (this one is written by hand)
    tables.json, vectors/        test vectors: see `reference/vectors.py`

`python -m reference golden` builds them again: bit for bit on x86-64, with the torch that the manifest names.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoint
from images import image_tokens
from ministral import MinistralConfig, MinistralForCausalLM
from ministral3 import Ministral3Config, Ministral3ForCausalLM
from model_types import load_model
from pretrained import PreTrainedModel
from reference.compare import LEAK, LEAST, MARGIN_OF_ONE_RUN, compare
from reference.trace import LAYER, POINTS, dimensions, load, record, save
from reference.vectors import write, write_vectors
from vision import Mistral3ForConditionalGeneration
from vision_config import Mistral3Config, PixtralVisionConfig

HERE = Path(__file__).resolve().parent / "golden"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
COMMAND = "python -m reference golden"
# So that the same bits come out on every x86-64 processor: no instructions that only some have.
ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
}
# Written to the manifest, whose bytes are tested.
DIMENSIONS = (
    "B texts, S tokens, T keys, E hidden size, H heads, G key heads, D numbers of a head, "
    "F intermediate size, V vocabulary, P patches of all images, C their size, M merged patches, "
    "HD all heads"
)

SIZES: dict[str, Any] = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    pad_token_id=0,
    initializer_range=0.35,
)
ROPE: dict[str, Any] = dict(
    rope_type="yarn",
    rope_theta=100.0,
    factor=4.0,
    original_max_position_embeddings=8,
    beta_fast=0.9,
    beta_slow=0.1,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.5,
)
VISION_SIZES: dict[str, Any] = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=24,
    patch_size=3,
    hidden_act="silu",
    initializer_range=0.35,
)
KINDS = ["full_attention", "sliding_attention", "sliding_attention"]


def models() -> dict[str, PreTrainedModel]:
    """The three models, in bfloat16, with weights from a fixed seed."""
    ministral = MinistralConfig(
        **SIZES, num_hidden_layers=3, sliding_window=5, layer_types=list(KINDS), rope_theta=100.0
    )  # fmt: skip
    text = Ministral3Config(**SIZES, num_hidden_layers=2, rope_parameters=ROPE)
    ministral3 = replace(text, tie_word_embeddings=True)
    mistral3 = Mistral3Config(PixtralVisionConfig(**VISION_SIZES), text, tie_word_embeddings=False)
    built: dict[str, PreTrainedModel] = {
        "ministral": MinistralForCausalLM(ministral),
        "ministral3": Ministral3ForCausalLM(ministral3),
        "mistral3": Mistral3ForConditionalGeneration(mistral3),
    }
    for seed, model in enumerate(built.values()):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                values = torch.randn(parameter.shape, generator=generator) * 0.35 + (parameter.ndim == 1)
                parameter.copy_(values)
    return {name: model.to(torch.bfloat16).eval() for name, model in built.items()}


def inputs(name: str, model: Any) -> dict[str, Tensor]:
    """The inputs of a model.

    The text models read two texts. The second one is shorter, with padding before it and positions that skip the
    padding. The vision model reads a text with two images.
    """
    generator = torch.Generator().manual_seed(7)
    if name == "mistral3":
        return vision_inputs(model, generator)
    ids = torch.randint(14, 40, (2, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    ids[0, 0] = 1
    ids[1, 5] = 1
    ids[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def vision_inputs(model: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """A text with two images of different sizes."""
    sizes = [(12, 18), (18, 12)]
    words = torch.randint(14, 40, (6,), generator=generator).tolist()
    first, second = (image_tokens(size, model.config, 12, 13) for size in sizes)
    ids = [1, 3, *first, *words[:3], *second, *words[3:], 4]
    pixels = torch.randn(2, 3, 18, 18, generator=generator).bfloat16().float()
    return {"input_ids": torch.tensor([ids]), "pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def quantize(
    directory: Path, scale_dtype: torch.dtype = torch.float32, grid: tuple[int, int] | None = None
) -> None:  # fmt: skip
    """Turn the matrices of the text layers of a model in Transformers' layout into FP8.

    As in the published Instruct models, each has one scale (a number without dimensions; with a `grid`, one for each
    of its blocks), and one for activations.
    """
    rows, columns = 1, 1
    if grid is not None:
        rows, columns = grid
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name in list(tensors):
        if "_proj.weight" not in name or "vision_tower" in name:
            continue
        weight = tensors[name].float()
        out_size, in_size = weight.shape
        blocks = weight.view(rows, out_size // rows, columns, in_size // columns)
        scale = (blocks.abs().amax((1, 3), keepdim=True) / 448).to(scale_dtype)
        quantized = (blocks / scale.float()).view(weight.shape)
        tensors[name] = quantized.to(torch.float8_e4m3fn)
        scale = scale[:, 0, :, 0]
        if grid is None:
            scale = scale[0, 0]
        tensors[f"{name}_scale_inv"] = scale.clone()
        tensors[name.replace("weight", "activation_scale")] = torch.tensor(1.0, dtype=scale_dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    config = checkpoint.read_config(directory)
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "weight_block_size": None,
    }
    checkpoint.write_json(directory / "config.json", config)


def arguments(given: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Inputs as the models take them: pixel values in a type."""
    converted = dict(given)
    for name, tensor in given.items():
        if tensor.is_floating_point():
            converted[name] = tensor.to(dtype)
    return converted


def build(directory: Path) -> None:
    """Write all files of the golden traces."""
    for name, model in models().items():
        build_model(directory / name, model, inputs(name, model))
    write(directory / "tolerances.json", tolerances(directory), depth=2)
    write_vectors(directory)
    shutil.copyfile(HERE / "compare.py", directory / "compare.py")
    checkpoint.write_json(directory / "manifest.json", manifest(directory))


def build_model(directory: Path, model: PreTrainedModel, given: Mapping[str, Tensor]) -> None:
    """Write one model, in three forms, and its traces."""
    directory.mkdir(parents=True)
    hf, fp8 = directory / "hf", directory / "fp8"
    model.save_pretrained(hf)
    model.save_pretrained(fp8)
    quantize(fp8)
    checkpoint.convert(hf, directory / "mistral", format="mistral")
    model.float().save_pretrained(hf)

    for kind, dtype in DTYPES.items():
        trace = record(load_model(hf, dtype), **arguments(given, dtype))
        about = {"made by": COMMAND, "model": "hf", "dtype": kind}
        save(directory / f"{kind}.safetensors", trace, given, about)
    for kind in ("float64", "bfloat16"):
        dtype = DTYPES[kind]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            quantized = load_model(fp8, dtype)
        logits = record(quantized, keep="logits".__eq__, **arguments(given, dtype))
        about = {"made by": COMMAND, "model": ".", "dtype": kind}
        save(fp8 / f"{kind}.safetensors", logits, given, about)


def manifest(directory: Path) -> dict[str, Any]:
    """A description of the files: hashes, shapes, the meaning of names, versions, and the command that makes them."""
    files: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        if not path.is_file() or path.name == "manifest.json":
            continue
        entry: dict[str, Any] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        if path.name == "float64.safetensors":  # the other types have the same tensors
            shapes = {name: list(tensor.shape) for name, tensor in load_file(path).items()}
            entry["tensors"] = {name: f"{shape} {dimensions(name)}".strip() for name, shape in shapes.items()}
        files[path.relative_to(directory).as_posix()] = entry
    versions = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    return {
        "command": COMMAND,
        "environment": ENVIRONMENT,
        "versions": versions,
        "dimensions": DIMENSIONS,
        "points": {name: f"[{dims}] {meaning}" for name, (dims, meaning) in POINTS.items()},
        "files": files,
    }


def read_files(directory: Path) -> dict[str, bytes]:
    """The bytes of all files in a directory: "golden/" and their path in it -> bytes."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {f"golden/{path.relative_to(directory).as_posix()}": path.read_bytes() for path in paths}


def check(directory: Path = HERE) -> list[str]:
    """Build everything again elsewhere, and return the files whose bytes differ from those in `directory`."""
    with tempfile.TemporaryDirectory() as elsewhere:
        build(Path(elsewhere) / "golden")
        new = read_files(Path(elsewhere) / "golden")
    old = read_files(directory)
    return sorted(name for name in new.keys() | old.keys() if new.get(name) != old.get(name))


def rebuild(directory: Path = HERE) -> None:
    """Replace the files in `directory`."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as elsewhere:
        build(Path(elsewhere) / "golden")
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(Path(elsewhere) / "golden", directory)


def noise(directory: Path = HERE) -> dict[str, dict[str, float]]:
    """The distance of float32 and bfloat16 to float64 at every stage.

    It is the largest error over the largest value, of the worst of the three models and all layers. Stage, with N for
    the layer -> type -> number.
    """
    worst: dict[str, dict[str, float]] = {}
    for path in sorted(directory.glob("*/float64.safetensors")):
        exact, _ = load(path)
        padding_mask = exact.get("input.attention_mask")
        if padding_mask is not None:
            padding_mask = padding_mask.bool()
        for kind in ("float32", "bfloat16"):
            trace, _ = load(path.with_name(f"{kind}.safetensors"))
            for stage in compare(trace, exact, {}, padding_mask).stages:
                entry = worst.setdefault(LAYER.sub("N", stage.name), {})
                entry[kind] = max(entry.get(kind, 0.0), stage.relative)
    return {name: worst[name] for name in POINTS if name in worst and not name.endswith(".mask")}


def tolerances(directory: Path = HERE) -> dict[str, Any]:
    """`noise` for tolerances.json, with the type float64, the dimensions of each stage, and masks, which are exact."""
    about = {
        "stages": "in the order of computing; N is a layer; for each type, the largest error of this "
        "implementation against float64 in the golden models, over the largest number of the stage",
        "margin": "a right port has at most this many times that error",
        "hidden": "the largest probability of a hidden key, in every type",
    }
    measured = noise(directory)
    stages: dict[str, dict[str, Any]] = {}
    for name, (dims, _) in POINTS.items():
        entry = {"float64": LEAST, **measured.get(name, {})}
        if name.endswith(".mask"):
            entry = dict.fromkeys(DTYPES, 0.0)
        stages[name] = {"dimensions": dims.split(), **entry}
    return {"about": about, "margin": MARGIN_OF_ONE_RUN, "hidden": LEAK, "stages": stages}


def noise_table(directory: Path = HERE) -> str:
    """`noise` in Markdown; neighbours that differ by less than a factor of 2 share a row with the larger numbers."""
    rows: list[tuple[str, list[str], list[dict[str, float]]]] = []
    for name, entry in noise(directory).items():
        part, _, point = name.rpartition(".")
        if rows and rows[-1][0] == part and all(is_near(other, entry) for other in rows[-1][2]):
            rows[-1][1].append(point)
            rows[-1][2].append(entry)
        else:
            rows.append((part, [point], [entry]))
    lines = ["| stage | float32 | bfloat16 |", "|---|---|---|"]
    for part, points, entries in rows:
        stage = ", ".join(points)
        if part:
            stage = f"`{part}`: {stage}"
        float32, bfloat16 = (max(entry[kind] for entry in entries) for kind in ("float32", "bfloat16"))
        lines.append(f"| {stage} | {float32:.0e} | {bfloat16:.0e} |")
    return "\n".join(lines)


def is_near(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    """True if the numbers of all types differ by less than a factor of 2."""
    return all(0.5 < a[kind] / b[kind] < 2 for kind in b)

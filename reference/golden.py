"""Build and check the golden traces.

They are tiny models in which every feature takes effect within 20 tokens: their weights as Transformers and Mistral
write them, and everything they compute in float64, float32 and bfloat16.

    reference/golden/ministral/       windows: full, sliding (5 keys), sliding; two texts, the second padded on the left
    reference/golden/ministral3/      YaRN with all three zones, queries scaled from position 8 on; the same texts
    reference/golden/mistral3/        the vision model: one text with two images of different sizes
    reference/golden/ministral3_wide/ heads of 32 numbers, four query heads for one key head; one text

        float64.safetensors  float32.safetensors  bfloat16.safetensors      traces; float64 is the reference
        one_text.safetensors      the first text alone, without padding, in float64
        decoding.safetensors      the same, its first 13 tokens in steps of 4, 1, 1, 1, 1, 3, 1 and 1, and the cache
        hf/        weights in Transformers' layout, as float32, which NumPy reads; all are bfloat16 numbers
        mistral/   the same in Mistral's layout, as bfloat16, which is how both are published
        fp8/       another model, hf/ in FP8: dequantized.safetensors has two of its matrices, float64.safetensors and
                   bfloat16.safetensors the outputs of all of them, and the logits
        maps/      the names of Transformers, MLX and llama.cpp for the stages

The wide model has hf/, fp8/ (with one scale for each block of 16 x 16 weights), maps/ and float64.safetensors. No
published configuration has YaRN and windows, so its layers have no window.

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
from reference.names import KNOWN_MAPS, map_of
from reference.trace import CACHE_POINTS, LAYER, POINTS, dimensions, load, record, save
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
WIDE: dict[str, Any] = SIZES | dict(
    hidden_size=32,
    intermediate_size=48,
    num_key_value_heads=1,
    head_dim=32,
    num_hidden_layers=2,
    rope_parameters=ROPE | dict(rope_theta=1e6, factor=16.0, beta_slow=0.05, llama_4_scaling_beta=0.1),
)
WIDE_BLOCK = (16, 16)
WIDE_LENGTH = 16  # tokens
# A prompt, steps that fill the ring of 5 slots and pass its end, a chunk, steps.
STEP_LENGTHS = [4, 1, 1, 1, 1, 3, 1, 1]
QUANTIZED = (".q", ".k", ".v", ".output", ".gate", ".up", ".down")  # stages that FP8 matrices give


def models() -> dict[str, PreTrainedModel]:
    """The models, in bfloat16, with weights from a fixed seed."""
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
        "ministral3_wide": Ministral3ForCausalLM(Ministral3Config(**WIDE)),
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
    padding. The vision model reads a text with two images. The wide model reads the first tokens of the first text.
    """
    generator = torch.Generator().manual_seed(7)
    if name == "mistral3":
        return vision_inputs(model, generator)
    ids = torch.randint(14, 40, (2, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    ids[0, 0] = 1
    if name == "ministral3_wide":
        return {"input_ids": ids[:1, :WIDE_LENGTH].clone()}
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
    directory: Path,
    scale_dtype: torch.dtype = torch.float32,
    grid: tuple[int, int] | None = None,
    block: tuple[int, int] | None = None,
) -> None:
    """Turn the matrices of the text layers of a model in Transformers' layout into FP8.

    As in the published Instruct models, each has one scale (a number without dimensions; with a `grid`, one for each
    of its blocks), and one for activations. With the size of a `block`, it has one for each block of this size and
    none for activations, and config.json has `weight_block_size`.
    """
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name in list(tensors):
        if "_proj.weight" not in name or "vision_tower" in name:
            continue
        weight = tensors[name].float()
        out_size, in_size = weight.shape
        rows, columns = 1, 1
        if grid is not None:
            rows, columns = grid
        if block is not None:
            rows, columns = out_size // block[0], in_size // block[1]
        blocks = weight.view(rows, out_size // rows, columns, in_size // columns)
        scale = (blocks.abs().amax((1, 3), keepdim=True) / 448).to(scale_dtype)
        quantized = (blocks / scale.float()).view(weight.shape)
        tensors[name] = quantized.to(torch.float8_e4m3fn)
        scale = scale[:, 0, :, 0]
        if grid is None and block is None:
            scale = scale[0, 0]
        tensors[f"{name}_scale_inv"] = scale.clone()
        if block is None:
            tensors[name.replace("weight", "activation_scale")] = torch.tensor(1.0, dtype=scale_dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    config = checkpoint.read_config(directory)
    quantization: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    if block is not None:
        quantization |= {"activation_scheme": "dynamic", "weight_block_size": list(block)}
    config["quantization_config"] = quantization
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
        for program in KNOWN_MAPS:
            write(directory / name / "maps" / f"{program}.json", map_of(program, model), depth=1)
    write(directory / "tolerances.json", tolerances(directory), depth=2)
    write_vectors(directory)
    shutil.copyfile(HERE / "compare.py", directory / "compare.py")
    checkpoint.write_json(directory / "manifest.json", manifest(directory))


def build_model(directory: Path, model: PreTrainedModel, given: Mapping[str, Tensor]) -> None:
    """Write one model, in three forms (the wide one in two), and its traces."""
    directory.mkdir(parents=True)
    is_wide = directory.name == "ministral3_wide"
    hf, fp8 = directory / "hf", directory / "fp8"
    model.save_pretrained(hf)
    model.save_pretrained(fp8)
    block = None
    if is_wide:
        block = WIDE_BLOCK
    else:
        checkpoint.convert(hf, directory / "mistral", format="mistral")
    quantize(fp8, block=block)
    model.float().save_pretrained(hf)

    kinds = list(DTYPES)
    if is_wide:
        kinds = ["float64"]
    for kind in kinds:
        trace = record(load_model(hf, DTYPES[kind]), **arguments(given, DTYPES[kind]))
        about = {"made by": COMMAND, "model": "hf", "dtype": kind}
        save(directory / f"{kind}.safetensors", trace, given, about)
    if len(given["input_ids"]) > 1:
        build_one_text(directory, given["input_ids"][:1])
    for kind in kinds:
        if kind != "float32":
            build_fp8_trace(fp8, given, kind)
    save_dequantized(fp8)


def build_one_text(directory: Path, ids: Tensor) -> None:
    """Write the traces of one text (1, S): the whole of it, and step by step."""
    model = load_model(directory / "hf", torch.float64)
    about = {"made by": COMMAND, "model": "hf", "dtype": "float64"}
    save(directory / "one_text.safetensors", record(model, ids), {"input_ids": ids}, about)

    def keep(name: str) -> bool:  # the keys of a sliding layer have another order in other caches
        return not name.endswith((".scores", ".mask", ".probabilities"))

    given = {"input_ids": ids[:, : sum(STEP_LENGTHS)], "step_lengths": torch.tensor(STEP_LENGTHS)}
    save(directory / "decoding.safetensors", record(model, keep=keep, **given), given, about)


def build_fp8_trace(directory: Path, given: Mapping[str, Tensor], kind: str) -> None:
    """Write what the FP8 matrices of a model give, and the logits."""

    def keep(name: str) -> bool:
        return name in ("final_norm", "logits") or (name.startswith("layers.") and name.endswith(QUANTIZED))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = load_model(directory, DTYPES[kind])
    trace = record(model, keep=keep, **arguments(given, DTYPES[kind]))
    about = {"made by": COMMAND, "model": ".", "dtype": kind}
    save(directory / f"{kind}.safetensors", trace, given, about)


def save_dequantized(directory: Path) -> None:
    """Write two matrices of an FP8 model to dequantized.safetensors, in four steps: NAME.codes are the FP8 numbers,
    NAME.scale is `weight_scale_inv`, NAME their product in float32, and NAME.bfloat16 the same, rounded. All are stored
    as float32."""
    tensors = load_file(directory / "model.safetensors")
    steps: dict[str, Tensor] = {}
    first = [name for name in tensors if name.endswith("layers.0.self_attn.q_proj.weight")]
    last = [name for name in sorted(tensors) if name.endswith("mlp.down_proj.weight")]
    for name in (first[0], last[-1]):
        scale = tensors[f"{name}_scale_inv"]
        steps[f"{name}.codes"] = tensors[name].float()
        steps[f"{name}.scale"] = scale.float()
        steps[name] = checkpoint.dequantize(tensors[name], scale, torch.float32)
        steps[f"{name}.bfloat16"] = checkpoint.dequantize(tensors[name], scale, torch.bfloat16).float()
    save_file(steps, directory / "dequantized.safetensors")


def manifest(directory: Path) -> dict[str, Any]:
    """A description of the files: hashes, shapes, the meaning of names, versions, and the command that makes them."""
    files: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        if not path.is_file() or path.name == "manifest.json":
            continue
        entry: dict[str, Any] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        if path.name in ("float64.safetensors", "dequantized.safetensors"):  # the other types have the same tensors
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
        "points": {name: f"[{dims}] {meaning}" for name, (dims, meaning) in (POINTS | CACHE_POINTS).items()},
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

    It is the largest error over the largest value, of the worst of the three models that have these types and all
    layers. Stage, with N for the layer -> type -> number. The cache has the errors of what it stores.
    """
    worst: dict[str, dict[str, float]] = {}
    for path in sorted(directory.glob("*/float64.safetensors")):
        if not path.with_name("float32.safetensors").is_file():
            continue
        exact, _ = load(path)
        padding_mask = exact.get("input.attention_mask")
        if padding_mask is not None:
            padding_mask = padding_mask.bool()
        for kind in ("float32", "bfloat16"):
            trace, _ = load(path.with_name(f"{kind}.safetensors"))
            for stage in compare(trace, exact, {}, padding_mask).stages:
                entry = worst.setdefault(LAYER.sub("N", stage.name), {})
                entry[kind] = max(entry.get(kind, 0.0), stage.relative)
    measured = {name: worst[name] for name in POINTS if name in worst and not name.endswith(".mask")}
    for name in CACHE_POINTS:
        stored = name.replace("cache.layers.N", "layers.N.attention")
        measured[name] = measured.get(stored, {"float32": 0.0, "bfloat16": 0.0})
    return measured


def tolerances(directory: Path = HERE) -> dict[str, Any]:
    """`noise` for tolerances.json, with the type float64, the dimensions of each stage, and masks and positions, which
    are exact."""
    about = {
        "stages": "in the order of computing; N is a layer; for each type, the largest error of this "
        "implementation against float64 in the golden models, over the largest number of the stage",
        "margin": "a right port has at most this many times that error",
        "hidden": "the largest probability of a hidden key, in every type",
    }
    measured = noise(directory)
    stages: dict[str, dict[str, Any]] = {}
    for name, (dims, _) in (POINTS | CACHE_POINTS).items():
        entry = {"float64": LEAST, **measured.get(name, {})}
        if name.endswith((".mask", ".positions")):
            entry = dict.fromkeys(DTYPES, 0.0)
        stages[name] = {"dimensions": dims.split(), **entry}
    return {"about": about, "margin": MARGIN_OF_ONE_RUN, "hidden": LEAK, "stages": stages}


def noise_table(directory: Path = HERE) -> str:
    """`noise` in Markdown; neighbours that differ by less than a factor of 2 share a row with the larger numbers."""
    rows: list[tuple[str, list[str], list[dict[str, float]]]] = []
    for name, entry in noise(directory).items():
        part, _, point = name.rpartition(".")
        if name in CACHE_POINTS:
            continue
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

"""The golden traces: three tiny models in which every feature fires within 20 tokens, their weights as Transformers and
Mistral write them, and everything they compute in float64, float32 and bfloat16.

    reference/golden/ministral/       windows: full, sliding (5 keys), sliding; two texts, the second padded on the left
    reference/golden/ministral3/      YaRN with all three zones, queries scaled from position 8 on; the same texts
    reference/golden/mistral3/        the same with eyes: two pictures of different sizes

        float64.safetensors  float32.safetensors  bfloat16.safetensors      traces; float64 is the truth
        hf/        weights in Transformers' layout, as float32, which NumPy reads; all are bfloat16 numbers
        mistral/   the same in Mistral's layout, as bfloat16, which is how both are published
        fp8/       another model, hf/ in FP8, and float64.safetensors and bfloat16.safetensors: its input and logits

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
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoint
from generate import load_model
from images import image_tokens
from ministral import MinistralConfig, MinistralForCausalLM
from ministral3 import Ministral3Config, Ministral3ForCausalLM
from pretrained import PreTrainedModel
from reference.compare import compare
from reference.trace import LAYER, POINTS, dimensions, load, record, save
from vision import Mistral3ForConditionalGeneration
from vision_config import Mistral3Config, PixtralVisionConfig

HERE = Path(__file__).resolve().parent / "golden"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
COMMAND = "python -m reference golden"
# So that the same bits come out on every x86-64 processor: no instructions that only some have.
ENVIRONMENT = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41",
               "OMP_NUM_THREADS": "1"}  # fmt: skip

SIZES: dict[str, Any] = dict(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=128, rms_norm_eps=1e-5, pad_token_id=0, initializer_range=0.35,
)  # fmt: skip
ROPE: dict[str, Any] = dict(
    rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=8, beta_fast=0.9, beta_slow=0.1,
    mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.5,
)  # fmt: skip


def models() -> dict[str, PreTrainedModel]:
    """The three models, in bfloat16, with weights from a fixed seed."""
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    old = MinistralConfig(**SIZES, num_hidden_layers=3, sliding_window=5, layer_types=kinds, rope_theta=100.0)
    new = Ministral3Config(**SIZES, num_hidden_layers=2, rope_parameters=ROPE, tie_word_embeddings=True)
    eyes = PixtralVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                               image_size=24, patch_size=3, hidden_act="silu", initializer_range=0.35)  # fmt: skip
    text = Ministral3Config(**SIZES, num_hidden_layers=2, rope_parameters=ROPE)
    seeing = Mistral3Config(eyes, text, tie_word_embeddings=False)
    built: dict[str, PreTrainedModel] = {
        "ministral": MinistralForCausalLM(old),
        "ministral3": Ministral3ForCausalLM(new),
        "mistral3": Mistral3ForConditionalGeneration(seeing),
    }
    for seed, model in enumerate(built.values()):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                values = torch.randn(parameter.shape, generator=generator) * 0.35 + (parameter.ndim == 1)
                parameter.copy_(values)
    return {name: model.to(torch.bfloat16).eval() for name, model in built.items()}


def inputs(name: str, model: Any) -> dict[str, Tensor]:
    """What the models are fed: for the text models two texts, the second one shorter, with padding before it and
    positions that skip it; for the one with eyes a text with two pictures."""
    generator = torch.Generator().manual_seed(7)
    if name != "mistral3":
        ids = torch.randint(14, 40, (2, 20), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, :5] = 0
        ids[0, 0] = ids[1, 5] = 1
        ids[1, :5] = 0
        return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    sizes = [(12, 18), (18, 12)]
    words = torch.randint(14, 40, (6,), generator=generator).tolist()
    pictures = [image_tokens(size, model.config, 12, 13) for size in sizes]
    ids = torch.tensor([[1, 3, *pictures[0], *words[:3], *pictures[1], *words[3:], 4]])
    pixels = torch.randn(2, 3, 18, 18, generator=generator).bfloat16().float()
    return {"input_ids": ids, "pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def quantize(directory: Path, scale_dtype: torch.dtype = torch.float32, grid: tuple[int, int] | None = None) -> None:
    """Turn the matrices of the text layers of a model in Transformers' layout into FP8, as in the published Instruct
    models: one scale each (a number without dimensions; or one for each block of a grid), and one for activations."""
    tensors = load_file(directory / "model.safetensors")
    rows, columns = grid or (1, 1)
    for name in [name for name in tensors if "_proj.weight" in name and "vision_tower" not in name]:
        weight = tensors[name].float()
        blocks = weight.view(rows, len(weight) // rows, columns, weight.shape[1] // columns)
        scale = (blocks.abs().amax((1, 3), keepdim=True) / 448).to(scale_dtype)
        tensors[name] = (blocks / scale.float()).view(weight.shape).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale[:, 0, :, 0].clone() if grid else scale[0, 0, 0, 0].clone()
        tensors[name.replace("weight", "activation_scale")] = torch.tensor(1.0, dtype=scale_dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = checkpoint.read_config(directory)
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    checkpoint.write_json(directory / "config.json", config)


def arguments(given: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Inputs as the models take them, numbers of pictures in a type."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in given.items()}


def build(directory: Path) -> None:
    """Write everything."""
    for name, model in models().items():
        here = directory / name
        here.mkdir(parents=True)
        given = inputs(name, model)
        for copy in ("hf", "fp8"):
            model.save_pretrained(here / copy)
        quantize(here / "fp8")
        checkpoint.convert(here / "hf", here / "mistral", format="mistral")
        model.float().save_pretrained(here / "hf")
        about = {"made by": COMMAND}
        for kind, dtype in DTYPES.items():
            trace = record(load_model(here / "hf", dtype), **arguments(given, dtype))
            save(here / f"{kind}.safetensors", trace, given, about | {"model": "hf", "dtype": kind})
        for kind in ("float64", "bfloat16"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                fp8 = load_model(here / "fp8", DTYPES[kind])
            logits = record(fp8, keep="logits".__eq__, **arguments(given, DTYPES[kind]))
            save(here / "fp8" / f"{kind}.safetensors", logits, given, about | {"model": ".", "dtype": kind})
    checkpoint.write_json(directory / "manifest.json", manifest(directory))


def manifest(directory: Path) -> dict[str, Any]:
    """What the files hold: hashes, shapes, what the names mean, versions, and the command that makes them."""
    files: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            entry: dict[str, Any] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            if path.name == "float64.safetensors":  # the other types have the same tensors
                entry["tensors"] = {n: f"{list(t.shape)} {dimensions(n)}".strip() for n, t in load_file(path).items()}
            files[path.relative_to(directory).as_posix()] = entry
    return {
        "command": COMMAND,
        "environment": ENVIRONMENT,
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()},
        "dimensions": "B texts, S tokens, T keys, E hidden size, H heads, G key heads, D numbers of a head, F "
        "intermediate size, V vocabulary, P patches of all pictures, C their size, M merged patches, HD all heads",
        "points": {name: f"[{dims}] {meaning}" for name, (dims, meaning) in POINTS.items()},
        "files": files,
    }


def check(directory: Path = HERE) -> list[str]:
    """Build everything again elsewhere, and return the files whose bytes differ from those in `directory`."""
    with tempfile.TemporaryDirectory() as elsewhere:
        build(Path(elsewhere) / "golden")
        new = {p.relative_to(elsewhere).as_posix(): p.read_bytes() for p in Path(elsewhere).rglob("*") if p.is_file()}
    old = {f"golden/{p.relative_to(directory).as_posix()}": p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    return sorted(name for name in new.keys() | old.keys() if new.get(name) != old.get(name))


def rebuild(directory: Path = HERE) -> None:
    """Replace the files in `directory`."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as elsewhere:
        build(Path(elsewhere) / "golden")
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(Path(elsewhere) / "golden", directory)


def noise(directory: Path = HERE) -> dict[str, dict[str, float]]:
    """How far float32 and bfloat16 are from float64 at every stage: the largest error over the largest value, of the
    worst of the three models and all layers. Stage, with N for the layer -> type -> number."""
    worst: dict[str, dict[str, float]] = {}
    for path in sorted(directory.glob("*/float64.safetensors")):
        truth, _ = load(path)
        mask = truth.get("input.attention_mask")
        for kind in ("float32", "bfloat16"):
            trace, _ = load(path.with_name(f"{kind}.safetensors"))
            for stage in compare(trace, truth, {}, None if mask is None else mask.bool()).stages:
                entry = worst.setdefault(LAYER.sub("N", stage.name), {})
                entry[kind] = max(entry.get(kind, 0.0), stage.relative)
    return {name: worst[name] for name in POINTS if name in worst and not name.endswith(".mask")}


def noise_table(directory: Path = HERE) -> str:
    """`noise` in Markdown; neighbours that differ by less than a factor of 2 share a row, which says the larger."""
    rows: list[tuple[str, list[str], list[dict[str, float]]]] = []
    for name, entry in noise(directory).items():
        part, _, point = name.rpartition(".")
        near = rows and all(0.5 < other[kind] / entry[kind] < 2 for other in rows[-1][2] for kind in entry)
        if near and rows[-1][0] == part:
            rows[-1][1].append(point)
            rows[-1][2].append(entry)
        else:
            rows.append((part, [point], [entry]))
    lines = ["| stage | float32 | bfloat16 |", "|---|---|---|"]
    for part, points, entries in rows:
        figures = " | ".join(f"{max(entry[kind] for entry in entries):.0e}" for kind in ("float32", "bfloat16"))
        lines.append(f"| {f'`{part}`: ' * bool(part)}{', '.join(points)} | {figures} |")
    return "\n".join(lines)

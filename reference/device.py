"""Whether a device computes right numbers: the golden models on it, stage by stage (`python generate.py --check`).

Some drivers and builds of PyTorch compute wrong numbers on some devices and report no error. What is compared with the
golden float64 traces: every stage of the eager model, the logits of fused attention, and the logits of the steps of
`generate`. `checked_once` runs this before the first use of a device and remembers the result.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from checkpoint import read_json, replace_file
from decoder import Decoder, choose_forward
from ministral import ATTENTION, KVCache
from model_types import load_model
from reference import golden
from reference.compare import MARGIN_OF_ONE_RUN, Report, compare
from reference.golden import HERE
from reference.trace import general_name, load, record, take_inputs
from tokenizer.bpe import cache_folder

CHECKED_MODELS = ("ministral", "ministral3", "mistral3")
PREFILLED = 8  # tokens of the prompt, before single steps


def first_difference(device: torch.device, dtype: torch.dtype) -> str | None:
    """Where a device computes wrong numbers in a type, in a sentence; None if it does not."""
    for name in CHECKED_MODELS:
        model: Any = load_model(HERE / name / "hf", dtype, device)
        exact, inputs = read_trace(HERE / name / "float64.safetensors")
        padding_mask = None
        if "attention_mask" in inputs:
            padding_mask = inputs["attention_mask"].bool()
        arguments = golden.arguments(inputs, dtype)
        for part, trace in computed(model, arguments):
            report = agreement(trace, exact, dtype, padding_mask)
            if not report.agrees:
                return f"{name}, {part}: {report.sentence}"
        if (HERE / name / "one_text.safetensors").is_file():
            exact, inputs = read_trace(HERE / name / "one_text.safetensors")
            logits = steps(model, inputs["input_ids"])
            exact = {"logits": exact["logits"][:, PREFILLED - 1 :]}
            report = agreement({"logits": logits}, exact, dtype, None)
            if not report.agrees:
                return f"{name}, the steps of generate: {report.sentence}"
    return None


def read_trace(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a golden trace, and its inputs."""
    trace, _ = load(path)
    inputs = take_inputs(trace)
    return trace, inputs


@torch.no_grad()
def computed(model: Any, arguments: dict[str, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What a model computes on its device, on the CPU: (in words, trace)."""
    yield "eager attention", {name: tensor.cpu() for name, tensor in record(model, **arguments).items()}
    moved = {name: tensor.to(model.device) for name, tensor in arguments.items()}
    for implementation in ATTENTION.keys() - {"eager"}:
        with patch.object(model.config.get_text_config(), "attn_implementation", implementation):
            logits = model(**moved, use_cache=False, return_dict=True).logits
        yield f"{implementation} attention", {"logits": logits.cpu()}


@torch.no_grad()
def steps(model: Any, input_ids: Tensor) -> Tensor:
    """The logits (1, S - PREFILLED + 1, V) after a prompt of PREFILLED tokens and after each token that follows, as
    `generate` computes them, on the CPU."""
    S = input_ids.shape[1]
    ids = input_ids.to(model.device)
    visible = torch.ones_like(ids, dtype=torch.bool)
    record_step = model.device.type == "cuda"
    decoder = Decoder(choose_forward(model, "auto"), KVCache(model.config, S), visible, record_step, False, S)
    logits = [decoder.prefill(ids[:, :PREFILLED], PREFILLED).cpu()]
    for place in range(PREFILLED, S):
        logits.append(decoder.step(ids[:, place : place + 1]).cpu())
    return torch.stack(logits, dim=1)


@cache
def measured() -> dict[str, dict[str, float]]:
    """The errors of a right port at each stage, by their types: the entries of golden/tolerances.json."""
    stages: dict[str, dict[str, float]] = read_json(HERE / "tolerances.json")["stages"]
    return stages


def agreement(trace: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype, mask: Tensor | None) -> Report:
    """The comparison of a trace in a type with the float64 trace. float16 may have the errors of bfloat16, which is
    coarser."""
    kind = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        kind = "bfloat16"
    stages = {name: measured().get(general_name(name), {}) for name in exact}
    relative = {name: entry[kind] for name, entry in stages.items() if kind in entry}
    return compare(trace, exact, {}, mask, relative, MARGIN_OF_ONE_RUN)


def checked_once(device: torch.device, dtype: torch.dtype) -> bool:
    """Check a device before its first use, unless the same device, driver and version of PyTorch have passed before.

    Returns:
        Whether it was checked now.

    Raises:
        ValueError: the device computes wrong numbers.
    """
    path = Path(cache_folder()).expanduser() / "ministral" / "checked-devices.json"
    key = f"{description(device)}, torch {torch.__version__}, {dtype}"
    passed: list[Any] = []
    with suppress(OSError, ValueError):  # a list that cannot be read is written again
        content = read_json(path)
        if isinstance(content, list):
            passed = content
    if key in passed:
        return False
    wrong = first_difference(device, dtype)
    if wrong is not None:
        cure = "another --device, --dtype or version of PyTorch; --no-check goes on"
        raise ValueError(f"{device} computes wrong numbers: {wrong}; {cure}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: temporary.write_text(json.dumps([*passed, key], indent=1)))
    return True


def description(device: torch.device) -> str:
    """The name of a device and the version of its driver."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, ROCm {torch.version.hip}"
    return f"{device.type} of {platform.machine()}, {platform.platform()}"

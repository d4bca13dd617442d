"""Shared by all measurements: our models and the same in Transformers, alternating runs, limits of the machine."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
import transformers

from checkpoint import GenerationConfig
from ministral import KVCache, MinistralConfig, MinistralForCausalLM
from ministral3 import Ministral3Config, Ministral3ForCausalLM
from model_types import BUNDLED
from products import avoids_onednn, split_mm, splits_rows, without_onednn

T = TypeVar("T")
# The shape of a model with 135 million parameters (SmolLM2), one of 5 million in three patterns of layers, the
# published text models of Ministral-3-3B and -8B, and tiny ones of these two. Weights are random: speed does not depend
# on them.
SMALL: dict[str, Any] = dict(
    vocab_size=4096, hidden_size=256, intermediate_size=688, num_attention_heads=8, num_key_value_heads=2,
    head_dim=32, num_hidden_layers=6, rms_norm_eps=1e-5, tie_word_embeddings=True, sliding_window=1024,
    max_position_embeddings=2**19,
)  # fmt: skip
TINY: dict[str, Any] = dict(
    vocab_size=512, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, pad_token_id=None,
)  # fmt: skip
CONFIGS: dict[str, MinistralConfig] = {
    "135m": MinistralConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, rms_norm_eps=1e-5, rope_theta=1e5,
        tie_word_embeddings=True, sliding_window=2**19, layer_types=["full_attention"] * 30,
        max_position_embeddings=2**19,
    ),
    "full": MinistralConfig(**SMALL | dict(layer_types=["full_attention"] * 6)),
    "sliding": MinistralConfig(**SMALL | dict(layer_types=["sliding_attention"] * 6)),
    "mixed": MinistralConfig(
        **SMALL | dict(layer_types=["full_attention", "sliding_attention", "sliding_attention"] * 2)
    ),
    "3b": Ministral3Config(
        hidden_size=3072, intermediate_size=9216, num_hidden_layers=26, tie_word_embeddings=True,
    ),
    "8b": Ministral3Config(hidden_size=4096, intermediate_size=14336, num_hidden_layers=34),
    "tiny-3b": Ministral3Config(**TINY | dict(tie_word_embeddings=True)),
    "tiny-8b": Ministral3Config(**TINY | dict(hidden_size=64)),
}  # fmt: skip


def ours(name: str, dtype: torch.dtype, device: str = "cpu") -> Any:
    """A model: "bundled" (its text model), or one of CONFIGS, whose weights are made on the device."""
    if name == "bundled":
        bundled = Ministral3ForCausalLM.from_pretrained(BUNDLED, dtype).to(device)
        bundled.generation_config = GenerationConfig()  # greedy, as the other models
        return bundled
    config = CONFIGS[name]
    cls = MinistralForCausalLM
    if isinstance(config, Ministral3Config):
        cls = Ministral3ForCausalLM
    with torch.device("meta"):
        model = cls(config)
    generator = torch.Generator().manual_seed(0)
    size = 2**20 + 7  # a prime: no two rows of a weight are equal, and no two tokens have equal logits
    noise = (torch.randn(size, generator=generator) * 0.02).to(device, dtype)
    for module in model.modules():
        for key, p in module.named_parameters(recurse=False):
            values = torch.ones(p.shape, dtype=dtype, device=device)
            if p.ndim > 1:
                values = noise.repeat(p.numel() // size + 1)[: p.numel()].view(p.shape)
            module.register_parameter(key, torch.nn.Parameter(values))
    model.tie_weights()
    return model.eval()


def theirs(model: Any, attn: str = "sdpa") -> Any:
    """The same model in Transformers, with the same tensors."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    config_class = getattr(transformers, type(model.config).__name__)
    model_class = getattr(transformers, type(model).__name__)
    values = model.config.to_dict()
    del values["model_type"]
    config = config_class(**values)
    config._attn_implementation = attn
    with torch.device("meta"):
        other = model_class._from_config(config, dtype=model.dtype)
    other.load_state_dict(model.state_dict(), assign=True)
    other.tie_weights()
    rotary = type(other.model.rotary_emb)(config)  # its frequencies are not in the state
    other.model.rotary_emb = rotary.to(model.device)
    return other.eval()


def our_cache(model: Any, length: int) -> KVCache:
    """A cache of `length` tokens of random keys and values."""
    cache = KVCache(model.config, expected=length + 64)
    for layer in cache.layers:
        layer.update(*_keys(model, length))
    return cache


def their_cache(model: Any, other: Any, length: int) -> Any:
    """The same for Transformers."""
    cache = transformers.DynamicCache(config=other.config)
    for n in range(model.config.num_hidden_layers):
        cache.update(*_keys(model, length), n)
    return cache


def _keys(model: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, model.config.num_key_value_heads, length, model.config.head_dim)
    generator = torch.Generator(model.device).manual_seed(length)
    keys = torch.randn(shape, generator=generator, device=model.device).to(model.dtype)
    return keys, keys.flip(2)


def step_bytes(model: Any) -> int:
    """Bytes of the weights that one decode step reads: all but the embeddings, unless these are also the head."""
    nbytes = sum(p.nbytes for p in model.parameters())
    if not model.config.tie_word_embeddings:
        nbytes -= model.lm_head.weight.nbytes
    return nbytes


def synchronize() -> None:
    """Wait until the GPU, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turn(runs: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """The results of each run. All run in turn, `rounds` times."""
    results: dict[str, list[T]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            results[name].append(run())
    return results


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of one run."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def alternate(runs: Mapping[str, Callable[[], object]], rounds: int, warm: bool = True) -> dict[str, float]:
    """Median seconds of each run. All run in turn, `rounds` times, after one round that does not count (`warm`)."""
    timed = {name: partial(seconds_of, run) for name, run in runs.items()}
    if warm:
        in_turn(timed, 1)
    return {name: statistics.median(seconds) for name, seconds in in_turn(timed, rounds).items()}


@torch.inference_mode()
def matvec_rate(dtype: torch.dtype, device: str = "cpu", rows: int = 32768, products: int = 1) -> float:
    """Bytes per second of reading weights, in products of a (rows, 4096) matrix with a vector, in the form that is
    fastest here (`products.py`). A GPU needs several products in a row, or the time of starting one counts."""
    matrix = torch.randn(rows, 4096, device=device, dtype=dtype)
    row = torch.randn(1, 4096, device=device, dtype=dtype)
    mm: Any = torch.mm
    if splits_rows(dtype, row.device):
        mm = split_mm
    setting: AbstractContextManager[None] = nullcontext()
    if avoids_onednn(dtype, row.device):
        setting = without_onednn()

    def multiply() -> None:
        for _ in range(products):
            mm(row, matrix.t())

    with setting:
        seconds = alternate({"vector": multiply}, 5)["vector"]
    return products * matrix.nbytes / seconds


def copy_rate(device: str, nbytes: int, copies: int = 1) -> float:
    """Bytes per second, read and written, of copying a tensor of `nbytes` on the device."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(copies):
            target.copy_(source)

    return 2 * copies * nbytes / alternate({"copy": copy}, 5)["copy"]


@torch.inference_mode()
def limits(dtype: torch.dtype) -> tuple[float, float]:
    """The limits of this machine: bytes per second of reading weights (in a product of a 32768 x 4096 matrix with a
    vector), and operations per second (in a product of a 4096 x 4096 matrix with 512 rows)."""
    square = torch.randn(4096, 4096).to(dtype)
    rows = torch.randn(512, 4096).to(dtype)
    seconds = alternate({"matrix": lambda: F.linear(rows, square)}, 5)["matrix"]
    return matvec_rate(dtype), 2 * 512 * 4096 * 4096 / seconds


def machine() -> str:
    """Hardware and versions, in a line."""
    cpu = platform.processor()
    if not cpu:
        cpu = platform.machine()
    info = ""
    if Path("/proc/cpuinfo").is_file():
        info = Path("/proc/cpuinfo").read_text()
    named = re.search(r"model name.*?:(.*)", info)
    if named:
        cpu = named[1].strip()
    features = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in info]
    if "ONEDNN_MAX_CPU_ISA" in os.environ:
        features.append(f"limited to {os.environ['ONEDNN_MAX_CPU_ISA']}")
    if torch.cuda.is_available():
        cpu += f", {torch.cuda.get_device_name()}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    threads = f"{torch.get_num_threads()} threads"
    return f"{cpu} ({', '.join(features)}), {threads}; Python {platform.python_version()}, {versions}"


def reset_peak() -> int:
    """Start to measure the peak of this process's memory (Linux); return the bytes in use now. Freed memory is given
    back to the system first, because memory that is only used again would not count."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The peak since `reset_peak`, in bytes."""
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

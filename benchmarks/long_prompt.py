"""Reading a prompt as long as the published context, through the published pattern of layers.

    python -m benchmarks.long_prompt                # 262,144 tokens, full attention with YaRN and query scaling
    python -m benchmarks.long_prompt ministral      # 131,072 tokens, one full layer and three with a window of 32,768

Layers are narrow, because the work is quadratic: 2 query heads of size 32 over one key head, hidden size 64, float32.
Prints the peak of memory beside the weights, and the size of the cache by its formula. The cache is most of the memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import common
from cli import Parser, exit_code, format_bytes, progress_bar
from decoder import kv_cache_bytes
from generate import generate
from ministral import MinistralConfig, MinistralForCausalLM
from ministral3 import Ministral3Config, Ministral3ForCausalLM

NARROW: dict[str, Any] = dict(
    vocab_size=1024, hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1,
    head_dim=32,
)  # fmt: skip


def build(family: str) -> tuple[MinistralForCausalLM, int]:
    """The model and the length of its prompt."""
    torch.manual_seed(0)
    if family == "ministral3":
        config = Ministral3Config(**NARROW, num_hidden_layers=2, max_position_embeddings=262145)
        return Ministral3ForCausalLM(config), 262144
    kinds = MinistralConfig.published_layer_types(4)
    mixed = MinistralConfig(
        **NARROW, num_hidden_layers=4, layer_types=kinds, sliding_window=32768, rope_theta=1e8,
        max_position_embeddings=131073,
    )  # fmt: skip
    return MinistralForCausalLM(mixed), 131072


def run(options: argparse.Namespace) -> int:
    """Measure once."""
    model, length = build(options.family)
    model.eval()
    ids = torch.randint(3, 1024, (1, length), generator=torch.Generator().manual_seed(0))
    generate(model, ids[:, :600], max_new_tokens=2, eos_token_id=())  # libraries reserve some memory once
    before = common.reset_peak()
    start = time.perf_counter()
    generate(model, ids, max_new_tokens=1, eos_token_id=(), on_prompt=progress_bar())
    seconds = time.perf_counter() - start
    growth = format_bytes(common.peak() - before)
    cache = format_bytes(kv_cache_bytes(model.config, length, 4))
    print(common.machine())
    print(f"{options.family}, {model.config.num_hidden_layers} layers, {length:,} tokens: {seconds:.0f} s")
    print(f"{growth} beside the weights at the peak; the cache is {cache} by the formula")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    parser = Parser(prog="python -m benchmarks.long_prompt", description="Read a prompt of the full context.")
    parser.add_argument("family", nargs="?", choices=("ministral", "ministral3"), default="ministral3")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())

"""Decode and prefill of the 135-million shape in comparison with llama.cpp, on the same weights, in alternating runs.

    pip install llama-cpp-python gguf               # compiles for about ten minutes
    python -m benchmarks.llama_cpp

The ratio is the time of llama.cpp divided by ours. First the logits are compared: both must compute the same model.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.bench import SHORT, prompt
from checkpoint import DTYPES
from cli import Parser, exit_code
from fast import FlatModel
from generate import generate
from ministral import KVCache

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(model: Any, path: Path) -> None:
    """Write the model as a GGUF file of architecture "llama", without a vocabulary. Such a file has norms in float32,
    and its rotary pairs are neighbours, so the rows of queries and keys are reordered."""
    gguf: Any = importlib.import_module("gguf")
    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(8192)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    types = {torch.float32: gguf.GGMLQuantizationType.F32, torch.bfloat16: gguf.GGMLQuantizationType.BF16}

    def add(name: str, tensor: torch.Tensor) -> None:
        dtype = tensor.dtype if tensor.ndim > 1 else torch.float32
        values = gguf.quants.quantize(tensor.detach().float().numpy(), types[dtype])
        writer.add_tensor(f"{name}.weight", values, raw_dtype=types[dtype])

    add("token_embd", model.model.embed_tokens.weight)
    add("output_norm", model.model.norm.weight)
    for n, layer in enumerate(model.model.layers):
        for ours, theirs in NAMES.items():
            weight = layer.get_submodule(ours).weight
            if theirs in ("attn_q", "attn_k"):
                pairs = weight.view(-1, 2, c.head_dim // 2, c.hidden_size)
                weight = pairs.transpose(1, 2).reshape(weight.shape)
            add(f"blk.{n}.{theirs}", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """The same model in llama.cpp."""

    def __init__(self, model: Any) -> None:
        self.library: Any = importlib.import_module("llama_cpp")
        self.vocab_size = model.config.vocab_size
        threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.gguf"
            write_gguf(model, path)
            self.llama = self.library.Llama(
                str(path), n_ctx=1024, n_threads=threads, verbose=False, n_threads_batch=threads, n_batch=512,
                n_ubatch=512, logits_all=False,
            )  # fmt: skip

    def __call__(self, ids: list[int], new: int = 0) -> Any:
        """Read a prompt, then `new` single tokens; return the logits of the last one."""
        self.llama.reset()
        self.llama.eval(ids)
        for token in range(3, 3 + new):
            self.llama.eval([token])
        logits = self.library.llama_get_logits(self.llama.ctx)
        return np.ctypeslib.as_array(logits, shape=(self.vocab_size,))


def expect_same_model(model: Any, other: LlamaCpp, ids: torch.Tensor, limit: float) -> None:
    """Raise ValueError if the logits after a prompt (1, 32) differ by more than `limit` of the largest one."""
    forward = FlatModel(model)
    with torch.inference_mode():
        ours = forward(ids, torch.arange(32)[None], KVCache(model.config))[0].float()
    theirs = torch.from_numpy(other(ids[0].tolist()).copy())
    error = (theirs - ours).abs().max() / ours.abs().max()
    if error > limit:
        raise ValueError(f"llama.cpp computes another model: its logits differ by {error:.1%} of the largest")


def measure(kind: str, rounds: int) -> list[str]:
    """The rows of one type."""
    model = common.ours("135m", DTYPES[SHORT[kind]])
    other = LlamaCpp(model)
    short, long = prompt(model, 32), prompt(model, 512)
    limits = {"f32": 0.005, "bf16": 0.05}  # measured: 0.02 % in float32, 1.3 % in bfloat16
    expect_same_model(model, other, short, limits[kind])
    runs: dict[str, Any] = {}
    for new in (1, 33):
        runs[f"ours {new}"] = partial(generate, model, short, max_new_tokens=new, eos_token_id=())
        runs[f"theirs {new}"] = partial(other, short[0].tolist(), new - 1)
    runs["ours long"] = partial(generate, model, long, max_new_tokens=1, eos_token_id=())
    runs["theirs long"] = partial(other, long[0].tolist())
    medians = common.alternate(runs, rounds)
    ours = (medians["ours 33"] - medians["ours 1"]) / 32
    theirs = (medians["theirs 33"] - medians["theirs 1"]) / 32
    decode = row(f"decode, {kind}", ours, theirs)
    prefill = row(f"prefill 512, {kind}", medians["ours long"] / 512, medians["theirs long"] / 512)
    return [decode, prefill]


def row(case: str, ours: float, theirs: float) -> str:
    """A row of the table, from seconds per token."""
    return f"| {case} | {1 / ours:.1f} tokens/s | {1 / theirs:.1f} | {theirs / ours:.2f} |"


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("gguf") is None:
        raise ValueError("llama.cpp is not installed; install it: pip install llama-cpp-python gguf")
    print(f"{common.machine()}\n\n| 135-million shape | here | llama.cpp | ratio |")
    print("|---|---|---|---|", flush=True)
    for kind in SHORT:
        print("\n".join(measure(kind, options.rounds)), flush=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    parser = Parser(prog="python -m benchmarks.llama_cpp", description="Measure against llama.cpp.")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    return exit_code(lambda: run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())

"""Against llama.cpp, on the same weights in one process, in turn: decode and prefill of the 135-million shape.

    pip install llama-cpp-python gguf               # compiles for about ten minutes
    python -m benchmarks.llama_cpp

The ratio is the seconds of llama.cpp over ours. That both compute the same model is checked first, by their logits.
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
from fast import flat
from generate import generate
from ministral import KVCache

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(model: Any, path: Path) -> None:
    """The model as a GGUF file of architecture "llama", without a vocabulary. Norms are float32 there, and rotary pairs
    are neighbours, so the rows of queries and keys change places."""
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
    kind = gguf.GGMLQuantizationType[{"float32": "F32", "bfloat16": "BF16"}[str(model.dtype).split(".")[1]]]

    def add(name: str, tensor: torch.Tensor) -> None:
        values = tensor.detach().float().numpy()
        to = kind if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, to), raw_dtype=to)

    add("token_embd", model.model.embed_tokens.weight)
    add("output_norm", model.model.norm.weight)
    for n, layer in enumerate(model.model.layers):
        for ours, theirs in NAMES.items():
            weight = layer.get_submodule(ours).weight
            if theirs in ("attn_q", "attn_k"):
                weight = weight.view(-1, 2, c.head_dim // 2, c.hidden_size).transpose(1, 2).reshape(weight.shape)
            add(f"blk.{n}.{theirs}", weight)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def measure(kind: str, rounds: int) -> list[str]:
    """The rows of one type."""
    llama_cpp: Any = importlib.import_module("llama_cpp")
    model = common.ours("135m", DTYPES[SHORT[kind]])
    with tempfile.TemporaryDirectory() as directory:
        write_gguf(model, Path(directory) / "model.gguf")
        threads = torch.get_num_threads()
        other = llama_cpp.Llama(str(Path(directory) / "model.gguf"), n_ctx=1024, n_threads=threads, verbose=False,
                                n_threads_batch=threads, n_batch=512, n_ubatch=512, logits_all=False)  # fmt: skip

    def theirs(ids: list[int], new: int = 0) -> Any:
        other.reset()
        for at in (ids, *([i] for i in range(3, 3 + new))):
            other.eval(at)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(other.ctx), shape=(model.config.vocab_size,))

    short, long = prompt(model, 32), prompt(model, 512)
    forward = flat(model)
    assert forward is not None
    with torch.inference_mode():
        ours = forward(short, torch.arange(32)[None], KVCache(model.config))[0].float()
    error = (torch.from_numpy(theirs(short[0].tolist()).copy()) - ours).abs().max() / ours.abs().max()
    # (Measured: 1.3 % in bfloat16, 0.02 % in float32.)
    if error > (0.05 if kind == "bf16" else 0.005):
        raise ValueError(f"llama.cpp computes another model: its logits differ by {error:.1%} of the largest")
    runs: dict[str, Any] = {}
    for new in (1, 33):
        runs[f"ours {new}"] = partial(generate, model, short, max_new_tokens=new, eos_token_id=())
        runs[f"theirs {new}"] = partial(theirs, short[0].tolist(), new - 1)
    runs["ours long"] = partial(generate, model, long, max_new_tokens=1, eos_token_id=())
    runs["theirs long"] = partial(theirs, long[0].tolist())
    found, rows = common.alternate(runs, rounds), []
    seconds = {side: (found[f"{side} 33"] - found[f"{side} 1"]) / 32 for side in ("ours", "theirs")}
    prefill = {side: found[f"{side} long"] / 512 for side in ("ours", "theirs")}
    for what, each in (("decode", seconds), ("prefill 512", prefill)):
        ratio = each["theirs"] / each["ours"]
        rows.append(f"| {what}, {kind} | {1 / each['ours']:.1f} tokens/s | {1 / each['theirs']:.1f} | {ratio:.2f} |")
    return rows


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("gguf") is None:
        raise ValueError("llama.cpp is not installed; do so by: pip install llama-cpp-python gguf")
    print(f"{common.machine()}\n\n| 135-million shape | here | llama.cpp | ratio |\n|---|---|---|---|", flush=True)
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

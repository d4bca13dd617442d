"""One model on several devices: every matrix is split, and each process has one part of it.

    torchrun --nproc-per-node 2 -m examples.tensor_parallel --model DIR_OR_HUB_ID "Why is the sky blue?"

The 14B model in bfloat16 takes 27 GB. With two GPUs of 24 GB, each has half of it. The work is done by
`torch.distributed.tensor.parallel`: a plan says how each module is split, and the model itself stays unchanged. Without
GPUs the processes share the CPU (backend gloo), which shows that it works and is no faster.

    q, k, v, gate, up     by rows: each process has some of the heads and features, and needs no other process
    o, down               by columns: each process has part of every sum; they are added, twice in each layer
    embeddings, head      by vocabulary: each process looks up its own ids, results are added, logits are gathered

Megatron-LM (https://arxiv.org/abs/1909.08053) splits in this way. To serve many users, give the same directory to vLLM
(`vllm serve DIR --tensor-parallel-size 2`) or to Transformers (`from_pretrained(DIR, tp_plan="auto")`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from cli import Parser, exit_code
from fast import text_model
from generate import generate
from model_types import BUNDLED, load_model
from tokenizer import Tokenizer


def shard(model: Any, mesh: DeviceMesh) -> Any:
    """Split a causal language model in place. Each process then has its part.

    Of a vision model, the language model is split. Each process has the whole vision tower, which is small.

    Raises:
        ValueError: heads that cannot be divided evenly.
    """
    processes = mesh.size()
    text = text_model(model)
    for name in ("num_key_value_heads", "intermediate_size", "vocab_size"):
        size = getattr(text.config, name)
        if size % processes:
            raise ValueError(f"{name}={size} in {processes} parts; allowed: a number that divides it")

    # PyTorch names these styles after the transpose: ColwiseParallel splits the rows of a weight (out, in).
    rows, columns = ColwiseParallel, RowwiseParallel
    plan: dict[str, ParallelStyle] = {
        "self_attn.q_proj": rows(),
        "self_attn.k_proj": rows(),
        "self_attn.v_proj": rows(),
        "self_attn.o_proj": columns(),
        "mlp.gate_proj": rows(),
        "mlp.up_proj": rows(),
        "mlp.down_proj": columns(),
    }
    for layer in text.layers:
        parallelize_module(layer, mesh, plan)
    embeddings = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    parallelize_module(text, mesh, {"embed_tokens": embeddings})
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    return model


def run(options: argparse.Namespace) -> int:
    """One of the processes."""
    if "RANK" not in os.environ:
        start = "torchrun --nproc-per-node 2 -m examples.tensor_parallel ..."
        raise ValueError(f"no process group; start it with: {start}")
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available() and not options.cpu:
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "nccl"
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(backend)
    try:
        generate_text(options, device)
    finally:
        dist.destroy_process_group()
    return 0


def generate_text(options: argparse.Namespace, device: torch.device) -> None:
    """Split the model over all processes and continue the prompt. Only the first process prints the text."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    tokenizer = Tokenizer.from_dir(options.model)
    model = shard(load_model(options.model), mesh).to(device)  # files are mapped: only the own part is read
    ids = torch.tensor([tokenizer.encode(options.prompt)], device=device)

    def show(_: int, token: int) -> None:
        if dist.get_rank() == 0:
            print(tokenizer.decode([token]), end="", flush=True)

    # With one seed, all processes draw the same tokens.
    generate(model, ids, max_new_tokens=options.max_new_tokens, seed=options.seed, on_token=show, fast=False)
    nbytes = sum(local(p).nbytes for p in model.parameters())
    print(f"\nprocess {dist.get_rank()} holds {nbytes / 1e6:,.1f} MB of weights", file=sys.stderr)


def local(parameter: Any) -> Any:
    """The part of a parameter that this process has."""
    if hasattr(parameter, "to_local"):
        return parameter.to_local()
    return parameter


def end_process(code: int) -> NoReturn:
    """End this process without Python's finalisation.

    PyTorch keeps the mesh, and so the threads of gloo, after `destroy_process_group`. Such a thread can still release a
    tensor. If Python is finalising at that moment, the process aborts, although its work is done (PyTorch pull request
    179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    description = "Continue a text with a model split over processes."
    parser = Parser(prog="examples.tensor_parallel", description=description)
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--model", default=str(BUNDLED), metavar="DIR", help="default: the bundled model")
    parser.add_argument("--max-new-tokens", type=int, default=40, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--cpu", action="store_true", help="do not use GPUs")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    end_process(main())

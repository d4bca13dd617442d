"""One model on several devices: every matrix is cut, each process holds its part of it.

    torchrun --nproc-per-node 2 -m examples.tensor_parallel --model DIR_OR_HUB_ID "Why is the sky blue?"

The 14B model in bfloat16 takes 27 GB: on two GPUs of 24 GB each holds half. PyTorch's own engine does the work
(`torch.distributed.tensor.parallel`): a plan says how each module is cut, and the model is run as it is. Without GPUs
the processes share the CPU (backend gloo), which shows that it works and is no faster.

    q, k, v, gate, up     by rows: each process has some of the heads, some of the features, and needs nobody else
    o, down               by columns: each has part of every sum; adding them up is the only exchange, two a layer
    embeddings, head      by vocabulary: looked up where they are and added, logits gathered

(Megatron-LM, https://arxiv.org/abs/1909.08053, cuts in this way.) From here on, the same directory is served to many at
once by vLLM (`vllm serve DIR --tensor-parallel-size 2`) or Transformers (`from_pretrained(DIR, tp_plan="auto")`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from cli import Parser, exit_code
from generate import BUNDLED, generate, load_model
from tokenizer import Tokenizer


def shard(model: Any, mesh: DeviceMesh) -> Any:
    """Cut a causal language model in place; every process then holds its part.

    Raises:
        ValueError: heads that cannot be shared out evenly, or a vision model.
    """
    config, processes = model.config, mesh.size()
    if not hasattr(model.model, "layers"):
        raise ValueError(f"a {type(model).__name__} has eyes; allowed: a text model, such as Ministral3ForCausalLM")
    for name in ("num_key_value_heads", "intermediate_size", "vocab_size"):
        if getattr(config, name) % processes:
            raise ValueError(f"{name}={getattr(config, name)} in {processes} parts; allowed: a number that divides it")
    rows, columns = ColwiseParallel, RowwiseParallel  # of a weight (out, in), in the names of its transpose
    plan: dict[str, ParallelStyle] = {f"self_attn.{name}_proj": rows() for name in "qkv"}
    plan |= {"self_attn.o_proj": columns(), "mlp.gate_proj": rows(), "mlp.up_proj": rows(), "mlp.down_proj": columns()}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    parallelize_module(model, mesh, {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    })  # fmt: skip
    return model


def run(options: argparse.Namespace) -> int:
    """One of the processes; the first prints."""
    cuda = torch.cuda.is_available() and not options.cpu
    rank, local = int(os.environ.get("RANK", -1)), int(os.environ.get("LOCAL_RANK", 0))
    if rank < 0:
        raise ValueError("no process group; start it with: torchrun --nproc-per-node 2 -m examples.tensor_parallel ...")
    if cuda:
        torch.cuda.set_device(local)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        tokenizer = Tokenizer.from_dir(options.model)
        model = shard(load_model(options.model), mesh).to(device)  # files are mapped: only the part is read
        ids = torch.tensor([tokenizer.encode(options.prompt)], device=device)

        def show(_: int, token: int) -> None:
            if rank == 0:
                print(tokenizer.decode([token]), end="", flush=True)

        generate(model, ids, max_new_tokens=options.max_new_tokens, on_token=show)
        held = sum(p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for p in model.parameters())
        print(f"\nprocess {rank} holds {held / 1e6:,.1f} MB of weights", file=sys.stderr)
    finally:
        dist.destroy_process_group()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    parser = Parser(prog="examples.tensor_parallel", description="Continue a text with a model cut over processes.")
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--model", default=str(BUNDLED), metavar="DIR", help="default: the bundled model")
    parser.add_argument("--max-new-tokens", type=int, default=40, metavar="N")
    parser.add_argument("--cpu", action="store_true", help="leave GPUs alone")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())

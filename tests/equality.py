"""Do two versions of this project compute the same, bit for bit? For changes that must not change a result:

    git worktree add ../before HEAD~1
    python tests/equality.py ../before .

Each version runs in a process of its own, over the same random models: text models, vision models and heads; float32,
bfloat16 and float16; hidden states, attentions, logits, losses, gradients; chunks through ring caches, padding, packed
texts, gradient checkpointing; generation; conversations; files in both layouts. Every result is reduced to a
hash. The names of those that differ are printed, and the exit code is 1. Only public names are used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

FAMILIES = ("ministral", "ministral3", "heads", "vision")
LAYERS = ("full_attention", "sliding_attention")


# ----------------------------------------------------------------------------------------------- one version: results


def digest(value: Any) -> str:
    """A hash of tensors (type, shape and bits), of containers of them, or of anything with a text."""
    import torch

    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().cpu()
        head = f"{raw.dtype}{tuple(raw.shape)}".encode()
        return hashlib.sha256(head + raw.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    if isinstance(value, (list, tuple)):
        return hashlib.sha256(" ".join(digest(item) for item in value).encode()).hexdigest()[:16]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()[:16]
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def text_config(rng: random.Random, family: str) -> Any:
    """A random tiny configuration of a text family."""
    from ministral import MinistralConfig
    from ministral3 import Ministral3Config

    groups, heads, layers = rng.choice([1, 2, 4]), rng.choice([1, 2]), rng.randint(1, 3)
    sizes: dict[str, Any] = dict(
        vocab_size=50, hidden_size=rng.choice([12, 20, 32]), intermediate_size=rng.choice([16, 40]),
        num_hidden_layers=layers, num_attention_heads=groups * heads, num_key_value_heads=heads,
        head_dim=rng.choice([4, 8, 16]), max_position_embeddings=256, initializer_range=0.3,
        tie_word_embeddings=rng.random() < 0.5, attn_implementation=rng.choice(["eager", "sdpa"]), pad_token_id=0,
    )  # fmt: skip
    if family == "ministral":
        kinds = [rng.choice(LAYERS) for _ in range(layers)]
        return MinistralConfig(**sizes, sliding_window=rng.choice([2, 3, 5, 8, 64]), layer_types=kinds)
    rope = dict(rope_type="yarn", rope_theta=1e4, factor=rng.choice([2.0, 16.0]), beta_fast=rng.choice([4.0, 32.0]),
                original_max_position_embeddings=rng.choice([8, 16]), llama_4_scaling_beta=0.1)  # fmt: skip
    rope |= rng.choice([{}, {"mscale": 1.0, "mscale_all_dim": 1.0}, {"truncate": False}])
    return Ministral3Config(**sizes, sliding_window=rng.choice([None, 5]), rope_parameters=rope)


def text_results(rng: random.Random, family: str) -> dict[str, Any]:
    """What a causal language model computes and writes."""
    import torch

    from generate import generate, load_model
    from ministral import KVCache, MinistralForCausalLM
    from ministral3 import Ministral3ForCausalLM

    config = text_config(rng, family)
    cls = MinistralForCausalLM if family == "ministral" else Ministral3ForCausalLM
    torch.manual_seed(rng.randrange(2**31))
    model = cls(config).to(rng.choice([torch.float32, torch.bfloat16, torch.float16])).eval()
    B, S = rng.randint(1, 3), rng.randint(2, 40)
    ids = torch.randint(1, 50, (B, S))
    mask = torch.ones_like(ids)
    mask[0, : rng.randint(0, S - 1)] = 0
    eager = config.attn_implementation == "eager"
    computed: dict[str, Any] = {}
    with torch.no_grad():
        out = model(ids, attention_mask=mask, labels=ids, output_hidden_states=True, output_attentions=eager)
        computed |= {"hidden states": out.hidden_states, "logits": out.logits, "loss": out.loss}
        computed["attentions"] = out.attentions or ()
        cache, logits, start = KVCache(config), [], 0
        while start < S:
            end = min(start + rng.choice([1, 1, 3, 9]), S)
            logits.append(model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
            start = end
        stored = [(layer.keys[:, :, : layer.length], layer.values[:, :, : layer.length]) for layer in cache.layers]
        computed |= {"chunks": logits, "cache": stored}
        packed = torch.cat((torch.arange(S // 2), torch.arange(S - S // 2)))[None]
        computed["packed"] = model(ids, position_ids=packed, use_cache=False).logits
        left = mask.sort(dim=1).values
        new = dict(max_new_tokens=8, eos_token_id=(), seed=1)
        for name, settings in (
            ("greedy", {}), ("readable", {"fast": False}), ("in chunks", {"prefill_chunk_size": 3}),
            ("drawn", dict(temperature=0.9, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2)),
        ):  # fmt: skip
            computed[name] = generate(model, ids, attention_mask=left, **new, **settings)
    if model.dtype == torch.float32:
        for checkpointing in (False, True):
            model.train().zero_grad()
            model.gradient_checkpointing = checkpointing
            model(ids, labels=ids, use_cache=False).loss.backward()
            computed[f"gradients, checkpointing {checkpointing}"] = [p.grad for p in model.parameters()]
    with tempfile.TemporaryDirectory() as folder:
        model.eval().save_pretrained(folder)
        computed |= {f"file {path.name}": path.read_bytes() for path in sorted(Path(folder).iterdir())}
        computed["loaded"] = list(load_model(folder).state_dict().items())
    return computed


def head_results(rng: random.Random, _: str) -> dict[str, Any]:
    """What the heads compute, with gradients."""
    import torch

    import heads

    family = rng.choice(["Ministral", "Ministral3"])
    task = rng.choice(["SequenceClassification", "TokenClassification", "QuestionAnswering"])
    config = text_config(rng, family.lower())
    torch.manual_seed(rng.randrange(2**31))
    model = getattr(heads, f"{family}For{task}")(config)
    ids = torch.randint(1, 50, (2, rng.randint(2, 20)))
    labels: dict[str, Any] = {"labels": torch.tensor([0, 1])}
    if task == "TokenClassification":
        labels = {"labels": ids % 2}
    if task == "QuestionAnswering":
        labels = {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([1, 1])}
    torch.manual_seed(0)
    out = model.train()(ids, **labels)
    out.loss.backward()
    logits = [getattr(out, name) for name in ("logits", "start_logits", "end_logits") if hasattr(out, name)]
    return {"loss": out.loss, "logits": logits, "gradients": [p.grad for p in model.parameters() if p.grad is not None]}


def vision_results(rng: random.Random, _: str) -> dict[str, Any]:
    """What the vision model computes and writes."""
    import torch

    from generate import generate
    from vision import Mistral3Config, Mistral3ForConditionalGeneration, PixtralVisionConfig

    tower = PixtralVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                                image_size=100, patch_size=2, initializer_range=0.3)  # fmt: skip
    config = Mistral3Config(tower, text_config(rng, "ministral3"), image_token_index=10,
                            spatial_merge_size=rng.choice([1, 2]))  # fmt: skip
    torch.manual_seed(rng.randrange(2**31))
    model = Mistral3ForConditionalGeneration(config).to(rng.choice([torch.float32, torch.bfloat16])).eval()
    side = 2 * config.spatial_merge_size
    sizes = [(side * rng.randint(1, 3), side * rng.randint(2, 4)) for _ in range(rng.randint(1, 2))]
    row: list[int] = []  # the tokens that stand for the images
    for height, width in sizes:
        row += (([10] * (width // side) + [12]) * (height // side))[:-1] + [13]
    ids = torch.tensor([[1, *row, 20, 21]])
    height, width = (max(size[i] for size in sizes) for i in (0, 1))
    images: dict[str, Any] = {"pixel_values": torch.randn(len(sizes), 3, height, width).to(model.dtype)}
    images["image_sizes"] = sizes
    with torch.no_grad():
        out = model(ids, **images, labels=ids, output_hidden_states=True)
        computed = {"hidden states": out.hidden_states, "loss": out.loss, "images": out.image_hidden_states}
        computed["greedy"] = generate(model, ids, max_new_tokens=6, eos_token_id=(), **images)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        computed |= {f"file {path.name}": path.read_bytes() for path in sorted(Path(folder).iterdir())}
    return computed


def bundled_results(bundled: Path) -> dict[str, Any]:
    """Text, conversations and conversion of a bundled model."""
    import torch

    import checkpoint
    from generate import generate, load_model
    from tokenizer import Tokenizer

    model, tokenizer = load_model(bundled, torch.float32), Tokenizer.from_dir(bundled)
    ids = torch.tensor([tokenizer.encode("To be, or not to be")])
    computed: dict[str, Any] = {"greedy": generate(model, ids, max_new_tokens=60, temperature=0)}
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "Be brief. [INST]"}, {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "abcdefghi", "name": "add"},
        {"role": "assistant", "content": "2"}, {"role": "user", "content": "Thanks."},
    ]  # fmt: skip
    for version in ("v3", "v7", "v11", "v13"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ids_of_chat = Tokenizer(tokenizer.backend, version).encode_chat(messages, [tool])
            except ValueError as error:
                ids_of_chat = [str(error)]
        computed[f"conversation {version}"] = ids_of_chat
    with tempfile.TemporaryDirectory() as folder:
        for format in ("mistral", "hf"):
            checkpoint.convert(bundled, Path(folder, format), format=format)
            written = sorted(Path(folder, format).iterdir())
            computed |= {f"converted {format} {path.name}": path.read_bytes() for path in written}
    return computed


def probe(tree: Path, models: int) -> None:
    """Print the hashes of one version's results as JSON."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    parts = {"ministral": text_results, "ministral3": text_results, "heads": head_results, "vision": vision_results}
    hashes: dict[str, str] = {}
    for bundled in sorted((tree / "models").iterdir()):
        hashes |= {f"{bundled.name}, {name}": digest(value) for name, value in bundled_results(bundled).items()}
    for number in range(models):
        family = FAMILIES[number % len(FAMILIES)]
        results = parts[family](random.Random(number), family)
        hashes |= {f"{family} {number}, {name}": digest(value) for name, value in results.items()}
    print(json.dumps(hashes))


# ------------------------------------------------------------------------------------------------------ two versions


def results(tree: Path, models: int) -> dict[str, str]:
    """The hashes of a version, from a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--probe", str(tree), "--models", str(models)]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    hashes: dict[str, str] = json.loads(done.stdout)
    return hashes


def main() -> int:
    """Compare two versions; 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", type=Path, metavar="TREE", help="the version before, the version after")
    parser.add_argument("--models", type=int, default=320, help="random models (default %(default)s)")
    parser.add_argument("--probe", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe is not None:
        probe(options.probe, options.models)
        return 0
    if len(options.trees) != 2:
        parser.error("give two directories: the version before and the version after")
    before, after = (results(tree.resolve(), options.models) for tree in options.trees)
    names = sorted(before.keys() | after.keys())
    differ = [name for name in names if before.get(name) != after.get(name)]
    print(f"{len(names)} results of {options.models} random models and the bundled ones: {len(differ)} differ")
    for name in differ[:40]:
        print(f"  {name}")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())

"""Train the bundled model. Everything random comes from the seed and the step, so a resumed run is the same run."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import GenerationConfig, replace_file, write_json
from ministral3 import Ministral3Config, Ministral3ForCausalLM
from tokenizer import SPECIAL_TOKENS, TEKKEN, Tokenizer, from_tekken
from training import corpus
from training.evaluate import bits_per_byte
from training.optimizer import Muon
from training.vocabulary import learn

BOS = SPECIAL_TOKENS.index("<s>")


@dataclass
class Recipe:
    """The numbers of a run. The defaults are those of the bundled model."""

    steps: int = 1000
    seed: int = 0
    tokens_per_step: int = 8192
    context: int = 1024  # the second half of the run; the first half reads a quarter of it at a time
    learning_rate: float = 5e-3
    warmup: int = 100
    weight_decay: float = 0.1
    dropout: float = 0.1
    vocab_size: int = 2048
    hidden_size: int = 256
    num_hidden_layers: int = 6
    validate_every: int = 200
    muon: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "tokens_per_step", "context", "warmup", "validate_every", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is impossible; allowed: a whole number not below 1")
        if self.context % 4 or self.tokens_per_step % self.context:
            allowed = "a multiple of 4 that divides tokens_per_step"
            raise ValueError(f"context={self.context} is impossible; allowed: {allowed}={self.tokens_per_step}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is impossible; allowed: a number from 0 to below 1")

    def config(self) -> Ministral3Config:
        """A Ministral 3 with all its features at the scale of the corpus: heads in groups of four as published, YaRN
        with its three zones, queries scaled from position 256 on, tied embeddings."""
        return Ministral3Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=528 * self.hidden_size // 256,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=self.hidden_size // 8,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": self.context // 4,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        )


def epoch_rows(works: list[list[int]], row: int, seed: int, epoch: int) -> Tensor:
    """The training tokens of one epoch, (rows, row): the works in random order, cut at random places, rows shuffled."""
    g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(works), generator=g).tolist()
    stream = torch.tensor([i for work in order for i in works[work]])
    stream = stream.roll(int(torch.randint(row, (), generator=g)))
    rows = stream[: len(stream) // row * row].view(-1, row)
    return rows[torch.randperm(len(rows), generator=g)]


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then linear decay to zero at the last step."""
    return recipe.learning_rate * min((step + 1) / recipe.warmup, (recipe.steps - step) / recipe.steps)


def add_dropout(model: nn.Module, p: float) -> None:
    """Dropout on what each attention and MLP adds to the residual stream, and on the embeddings, in training only.
    Hooks, because it belongs to this recipe and not to the architecture. (Dropout on attention probabilities would
    need `attention_dropout`, for which the CPU has no fused kernel: a step takes 7 times as long.)"""

    def drop(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return F.dropout(output, p, module.training)

    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj", "embed_tokens")):
            module.register_forward_hook(drop)


def autocast(device: torch.device) -> torch.autocast:
    """Products in bfloat16 where the machine multiplies it faster than float32: GPUs, and CPUs with AMX."""
    fast = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_amx_tile_supported())
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def train(recipe: Recipe, output: Path, device: torch.device) -> None:
    """Run `recipe` to its end, from the state in `output` if there is one. The checkpoint that is best on the
    validation play is written to `output` in bfloat16, with its tokenizer.

    Raises:
        ValueError: `output` holds the state of a run with another recipe.
    """
    output.mkdir(parents=True, exist_ok=True)
    state_file = output / "state.pt"
    texts = corpus.load()
    tekken = learn(texts["train"], recipe.vocab_size)
    tokenizer = Tokenizer(from_tekken(tekken))
    works = [tokenizer.encode(text) for text in texts["train"]]

    torch.manual_seed(recipe.seed)
    model = Ministral3ForCausalLM(recipe.config()).to(device)
    add_dropout(model, recipe.dropout)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and recipe.muon]
    in_muon = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in in_muon]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay)
    ]
    if matrices:
        optimizers.append(Muon(matrices, lr=recipe.learning_rate, weight_decay=recipe.weight_decay))

    step, best, seconds, log = 0, float("inf"), 0.0, []
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        if state["recipe"] != asdict(recipe):
            raise ValueError(f"{state_file} belongs to another recipe; choose another --output or remove it")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        step, best, seconds, log = state["step"], state["best"], state["seconds"], state["log"]

    rows_per_step = recipe.tokens_per_step // recipe.context
    epoch, rows = -1, torch.empty(0)
    per_epoch = len(epoch_rows(works, recipe.context, recipe.seed, 0)) // rows_per_step
    if per_epoch == 0:
        raise ValueError(f"the corpus has fewer than tokens_per_step={recipe.tokens_per_step} tokens")
    bar = tqdm(total=recipe.steps, initial=step, unit="step", smoothing=0.05)
    mark = time.monotonic()
    while step < recipe.steps:
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            rows = epoch_rows(works, recipe.context, recipe.seed, epoch)
        first = step % per_epoch * rows_per_step
        loss = train_step(model, optimizers, rows[first : first + rows_per_step].to(device), step, recipe)
        step += 1
        bar.update()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", best=f"{best:.4f}", refresh=False)
        if step % recipe.validate_every == 0 or step == recipe.steps:
            model.eval()
            score = bits_per_byte(model, tokenizer, texts["validation"], recipe.context)
            seconds, mark = seconds + time.monotonic() - mark, time.monotonic()
            entry = {"step": step, "loss": loss.item(), "validation_bits_per_byte": score}
            log.append(entry | {"seconds": round(seconds)})
            bar.write(json.dumps(log[-1]))
            if score < best:
                best = score
                save(model, tekken, output, recipe)
            record = {"recipe": asdict(recipe), "torch": torch.__version__, "log": log}
            write_json(output / "training_log.json", record)
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
            state |= {"best": best, "seconds": seconds, "log": log, "recipe": asdict(recipe)}
            replace_file(state_file, partial(torch.save, state))
    bar.close()


def train_step(
    model: Ministral3ForCausalLM, optimizers: list[torch.optim.Optimizer], rows: Tensor, step: int, recipe: Recipe
) -> Tensor:
    """One update from rows of tokens (R, context). Short texts are put at random positions, so that every position,
    and every step of the query scale, has been trained. Every second text begins with <s>, so that a prompt, which
    does, need not be the beginning of a play."""
    model.train()
    torch.manual_seed(recipe.seed * 1_000_003 + step)
    length = recipe.context if 2 * step >= recipe.steps else recipe.context // 4
    x = rows.reshape(-1, length).clone()
    x[::2, 0] = BOS
    start = torch.randint(recipe.context - length + 1, (len(x), 1)).to(x.device)
    positions = start + torch.arange(length, device=x.device)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
    with autocast(x.device):
        loss = model(x, position_ids=positions, labels=x, use_cache=False).loss
    assert loss is not None
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def save(model: Ministral3ForCausalLM, tekken: dict[str, Any], output: Path, recipe: Recipe) -> None:
    """Write the model in bfloat16 beside its tokenizer."""
    copy = Ministral3ForCausalLM(recipe.config())
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig.from_pretrained(output)  # kept: it was chosen by hand
    copy.to(torch.bfloat16).save_pretrained(output)
    write_json(output / TEKKEN, tekken)

"""Train the bundled model. Everything random comes from the seed and the step, so a resumed run is the same run."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
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
    context: int = 1024  # of the second half of the run; the first half trains on texts of a quarter of it
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
                found = f"{name}={getattr(self, name)}"
                raise ValueError(f"{found} is impossible; allowed: a whole number not below 1")
        if self.context % 4 or self.tokens_per_step % self.context:
            allowed = f"a multiple of 4 that divides tokens_per_step={self.tokens_per_step}"
            raise ValueError(f"context={self.context} is impossible; allowed: {allowed}")
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
    stream = torch.tensor([token for work in order for token in works[work]])
    stream = stream.roll(int(torch.randint(row, (), generator=g)))
    count = len(stream) // row
    rows = stream[: count * row].view(-1, row)
    return rows[torch.randperm(len(rows), generator=g)]


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then linear decay to zero at the last step."""
    warmup = (step + 1) / recipe.warmup
    decay = (recipe.steps - step) / recipe.steps
    return recipe.learning_rate * min(warmup, decay)


def add_dropout(model: nn.Module, p: float) -> None:
    """Dropout on what each attention and MLP adds to the residual stream, and on the embeddings, in training only.

    These are hooks, because the dropout belongs to this recipe and not to the architecture. (Dropout on attention
    probabilities would need `attention_dropout`. The CPU has no fused kernel for it: a step takes 7 times as long.)"""

    def drop(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return F.dropout(output, p, module.training)

    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj", "embed_tokens")):
            module.register_forward_hook(drop)


def autocast(device: torch.device) -> torch.autocast:
    """Products in bfloat16 where they are faster than in float32: on GPUs, and on CPUs with AMX."""
    amx = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    fast = device.type == "cuda" or amx
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    best: float = float("inf")  # the best score on the validation play so far
    seconds: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)


class Batches:
    """The training tokens of each step."""

    def __init__(self, works: list[list[int]], recipe: Recipe) -> None:
        self.works, self.recipe = works, recipe
        self.rows_per_step = recipe.tokens_per_step // recipe.context
        self.epoch, self.rows = 0, epoch_rows(works, recipe.context, recipe.seed, 0)
        self.steps_per_epoch = len(self.rows) // self.rows_per_step
        if self.steps_per_epoch == 0:
            raise ValueError(f"the corpus has fewer than tokens_per_step={recipe.tokens_per_step} tokens")

    def of_step(self, step: int) -> Tensor:
        """The rows of a step, (rows_per_step, context)."""
        epoch = step // self.steps_per_epoch
        if epoch != self.epoch:
            self.epoch = epoch
            self.rows = epoch_rows(self.works, self.recipe.context, self.recipe.seed, epoch)
        first = step % self.steps_per_epoch * self.rows_per_step
        return self.rows[first : first + self.rows_per_step]


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or AdamW for embeddings and norms and Muon for the matrices."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        if recipe.muon and p.ndim == 2 and "embed" not in name:
            matrices.append(p)
        else:
            others.append(p)
    settings: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, betas=(0.9, 0.95), **settings)]
    if matrices:
        optimizers.append(Muon(matrices, **settings))
    return optimizers


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
    optimizers = make_optimizers(model, recipe)
    progress = Progress()
    if state_file.exists():
        progress = load_state(state_file, recipe, model, optimizers)
    batches = Batches(works, recipe)

    bar = tqdm(total=recipe.steps, initial=progress.step, unit="step", smoothing=0.05)
    last_time = time.monotonic()
    while progress.step < recipe.steps:
        rows = batches.of_step(progress.step).to(device)
        loss = train_step(model, optimizers, rows, progress.step, recipe)
        progress.step += 1
        bar.update()
        if progress.step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", best=f"{progress.best:.4f}", refresh=False)
        if progress.step % recipe.validate_every and progress.step < recipe.steps:
            continue

        # Validate, and write the best model, the log and the state.
        model.eval()
        score = bits_per_byte(model, tokenizer, texts["validation"], recipe.context)
        now = time.monotonic()
        progress.seconds += now - last_time
        last_time = now
        entry = {"step": progress.step, "loss": loss.item(), "validation_bits_per_byte": score}
        entry["seconds"] = round(progress.seconds)
        progress.log.append(entry)
        bar.write(json.dumps(entry))
        if score < progress.best:
            progress.best = score
            save(model, tekken, output, recipe)
        record = {"recipe": asdict(recipe), "torch": torch.__version__, "log": progress.log}
        write_json(output / "training_log.json", record)
        save_state(state_file, recipe, model, optimizers, progress)
    bar.close()


def save_state(
    path: Path, recipe: Recipe, model: nn.Module, optimizers: list[torch.optim.Optimizer], progress: Progress
) -> None:  # fmt: skip
    """Write all that a run needs to go on."""
    state: dict[str, Any] = {"model": model.state_dict()}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    state |= asdict(progress)
    state["recipe"] = asdict(recipe)
    replace_file(path, partial(torch.save, state))


def load_state(
    path: Path, recipe: Recipe, model: Ministral3ForCausalLM, optimizers: list[torch.optim.Optimizer]
) -> Progress:  # fmt: skip
    """Set model and optimizers to a saved state; return how far that run had come.

    Raises:
        ValueError: the state of a run with another recipe.
    """
    state = torch.load(path, map_location=model.device, weights_only=True)
    if state["recipe"] != asdict(recipe):
        raise ValueError(f"{path} belongs to another recipe; choose another --output or remove it")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    return Progress(state["step"], state["best"], state["seconds"], state["log"])


def train_step(
    model: Ministral3ForCausalLM, optimizers: list[torch.optim.Optimizer], rows: Tensor, step: int,
    recipe: Recipe,
) -> Tensor:  # fmt: skip
    """One update from rows of tokens (R, context).

    Short texts are put at random positions, so that every position and every step of the query scale is trained. Every
    second text begins with <s>. A prompt begins with <s>, too, and need not be the beginning of a play."""
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
        loss = model(x, position_ids=positions, labels=x, use_cache=False, return_dict=True).loss
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
    copy.generation_config = GenerationConfig.from_pretrained(output)  # its settings were chosen by hand
    copy.to(torch.bfloat16).save_pretrained(output)
    write_json(output / TEKKEN, tekken)

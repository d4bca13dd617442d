"""Train a miniature in its stages. Everything random comes from the seed, the stage and the step, so a resumed run is the
same run."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from checkpoint import GenerationConfig, read_json, replace_file, write_json
from tokenizer import TEKKEN, Tokenizer, from_tekken
from training import corpus
from training.bits import bits_per_byte
from training.optimizer import make_optimizers
from training.recipes import Recipe
from training.rows import ANSWER, TEXT, Batch, Rows, Stage, pixel_values
from training.shapes import COLOURS, KINDS
from training.tasks import CHAT_SAMPLE, Draw, Plays, conversation, words_of
from training.vocabulary import as_v3, learn

LOG_EVERY = 100  # steps
SAVE_EVERY = 30  # seconds
VALIDATE_EVERY = 500  # steps


@dataclass
class Progress:
    """How far a run has come."""

    stage: int = 0
    step: int = 0
    seconds: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)


class Tower(nn.Module):
    """The vision tower with the first half of the projector, and a linear layer that says what each merged patch shows:
    nothing, or a kind and a colour. The linear layer is thrown away after the stage."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.head = nn.Linear(self.tower.config.hidden_size, 1 + len(KINDS) * len(COLOURS))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (N, 3, H, W) -> logits (N * merged patches, classes)."""
        grids = self.tower.grids(pixels, None)
        x = self.tower(pixels, return_dict=True).last_hidden_state[0]
        return self.head(self.projector.patch_merger(self.projector.norm(x), grids))


class Trainer:
    """A run of a recipe.

    Args:
        output: the directory of the state, the log, the model and the tokenizer.
        workers: processes that make the rows; 0: this process.
        seconds: the run ends after so many seconds. Stages become shorter, their learning rates fall faster.
    """

    def __init__(
        self, recipe: Recipe, output: Path, device: torch.device, workers: int = 0, seconds: float = math.inf
    ) -> None:  # fmt: skip
        self.recipe, self.output, self.device, self.workers = recipe, output, device, workers
        self.end = time.monotonic() + seconds
        output.mkdir(parents=True, exist_ok=True)
        self.texts = corpus.load()
        self.plays = Plays.of(self.texts["train"], self.texts["test"])
        if not (output / TEKKEN).exists():
            draw = Draw(f"{recipe.seed} vocabulary", self.plays)
            samples = [words_of(conversation(draw, CHAT_SAMPLE, 2500)) for _ in range(150)]
            tekken = learn([*self.texts["train"], *samples], recipe.vocab_size)
            if recipe.kind != "ministral3":
                tekken = as_v3(tekken)
            write_json(output / TEKKEN, tekken)
        self.tokenizer = Tokenizer(*read_vocabulary(output / TEKKEN))
        self.stream = np.concatenate([np.array(self.tokenizer.encode(text)) for text in self.texts["train"]])
        self.progress = Progress()
        self.last = time.monotonic()

    def run(self) -> None:
        """Run all stages, from the saved state if there is one, and write the model in bfloat16.

        Raises:
            ValueError: the state of another recipe.
        """
        stages = self.recipe.stages
        state = self.load_state()
        weights = state.get("model")
        while self.progress.stage < len(stages):
            stage = stages[self.progress.stage]
            torch.manual_seed(self.recipe.seed * 1_000_003 + self.progress.stage)
            # Rotary frequencies are kept, so another factor needs a new model.
            model = self.recipe.model(stage.factor).to(self.device)
            if weights is not None:
                model.load_state_dict(weights)
            self.run_stage(stage, model, state)
            if stage.images:
                match_spread(model, self.rows(stage, model)[0].to(self.device))
            self.validate(model, stage.name)
            if self.progress.stage == 0:  # `evaluate` compares stretched contexts with and without more training
                save(model, self.output / f"after_{stage.name}")
            self.progress.stage += 1
            self.progress.step = 0
            if self.progress.stage == len(stages):
                save(model, self.output)
            self.save_state(model, model, [])
            state, weights = {}, model.state_dict()
        draw_curves(self.progress.log, self.output / "loss.png")

    def rows(self, stage: Stage, model: Any) -> Rows:
        """The batches of a stage."""
        return Rows(stage, self.plays, self.stream, self.tokenizer, model.config, self.recipe.seed)

    def run_stage(self, stage: Stage, model: Any, state: dict[str, Any]) -> None:
        """Run one stage from the step of `progress`."""
        module: nn.Module = model
        if stage.images:
            module = Tower(model).to(self.device)
        else:
            add_dropout(model, stage.dropout)
        optimizers = make_optimizers(module, self.recipe.muon)
        if state.get("optimizers"):
            module.load_state_dict(state["module"])
            for optimizer, saved in zip(optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
        loader = DataLoader(
            self.rows(stage, model), batch_size=None, sampler=range(self.progress.step, stage.steps), num_workers=self.workers,
            prefetch_factor=4 if self.workers else None, collate_fn=unchanged,
        )  # fmt: skip
        losses: list[Tensor] = []
        began = started = saved_at = time.monotonic()
        tokens = 0
        costs = [later.cost for later in self.recipe.stages[self.progress.stage :]]
        limit = (self.end - began) * costs[0] / sum(costs)  # seconds of this stage
        for batch in loader:
            done = max(self.progress.step / stage.steps, (time.monotonic() - began) / limit)
            if done > 1:
                break
            batch = batch.to(self.device)
            losses.append(self.step(stage, module, optimizers, batch, done))
            tokens += batch.ids.numel()
            self.progress.step += 1
            step = self.progress.step
            if step % LOG_EVERY == 0 or step == stage.steps:
                self.report(stage, torch.stack(losses).mean(dim=0).tolist(), tokens / (time.monotonic() - started))
                losses.clear()
                started, tokens = time.monotonic(), 0
            if step % VALIDATE_EVERY == 0 and step < stage.steps and not stage.images:
                self.validate(model, stage.name)
            if time.monotonic() - saved_at > SAVE_EVERY:
                save(model, self.output)
                self.save_state(model, module, optimizers)
                saved_at = time.monotonic()

    def step(self, stage: Stage, module: nn.Module, optimizers: list[torch.optim.Optimizer], batch: Batch, done: float) -> Tensor:
        """One update, when a part of the stage is done, from 0 to 1. Returns the losses of text and of answers (2,)."""
        step = self.progress.step
        module.train()
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.progress.stage * 100_000 + step)
        rate = learning_rate(stage, step, done)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        with autocast(self.device):
            if stage.images:
                logits = module(pixel_values(batch.images)).float()
                losses = F.cross_entropy(logits, batch.ids.flatten()).expand(2)
            else:
                losses = text_and_answers(module, batch)
        weights = losses.new_tensor([1 - self.recipe.answer_weight, self.recipe.answer_weight])
        (losses * weights).sum().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return losses.detach()

    def report(self, stage: Stage, losses: list[float], speed: float) -> None:
        """Print and log a line."""
        now = time.monotonic()
        self.progress.seconds += now - self.last
        self.last = now
        text, answers = losses
        entry = {"stage": stage.name, "step": self.progress.step, "text": text, "answers": answers}
        entry |= {"seconds": round(self.progress.seconds, 1), "tokens_per_second": round(speed)}
        self.progress.log.append(entry)
        line = f"{self.recipe.kind} {stage.name} {self.progress.step}/{stage.steps}: text {text:.3f}, answers {answers:.4f}"
        print(f"{line}, {speed:.0f} tokens/s, {self.progress.seconds:.0f} s", flush=True)

    @torch.no_grad()
    def validate(self, model: Any, name: str) -> None:
        """Print and log the bits per byte of the beginning of the validation play."""
        model.eval()
        with autocast(self.device):
            score = bits_per_byte(model, self.tokenizer, [self.texts["validation"][0][:40000]], 1024)
        self.progress.log.append({"stage": name, "step": self.progress.step, "bits_per_byte": score})
        print(f"{self.recipe.kind} {name} {self.progress.step}: {score:.4f} bits per byte of the validation play", flush=True)

    def save_state(self, model: Any, module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        """Write all that a run needs to go on, and the log."""
        state: dict[str, Any] = {"model": model.state_dict(), "module": module.state_dict()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        state |= {"progress": asdict(self.progress), "recipe": repr(self.recipe)}
        replace_file(self.output / "state.pt", partial(torch.save, state))
        record = {"recipe": asdict(self.recipe), "torch": torch.__version__, "device": device_name(self.device)}
        write_json(self.output / "training_log.json", record | {"log": self.progress.log})

    def load_state(self) -> dict[str, Any]:
        """Read the saved state, and set `progress`; {} if there is none."""
        path = self.output / "state.pt"
        if not path.exists():
            return {}
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["recipe"] != repr(self.recipe):
            raise ValueError(f"{path} belongs to another recipe; choose another --output or remove it")
        self.progress = Progress(**state["progress"])
        return dict(state)


def unchanged(batch: Any) -> Any:
    """The batch itself. As arrays, batches come from the workers through pipes and need no shared memory."""
    return batch


def read_vocabulary(path: Path) -> tuple[Any, str]:
    """The vocabulary of a tekken.json, and its version."""
    tekken = read_json(path)
    return from_tekken(tekken), tekken["config"]["version"]


def text_and_answers(model: nn.Module, batch: Batch) -> Tensor:
    """The mean losses of the text and of the answers in a batch (2,); 0 where there is none."""
    arguments: dict[str, Any] = {}
    if len(batch.images):
        arguments["pixel_values"] = pixel_values(batch.images)
    logits = model(batch.ids, use_cache=False, return_dict=True, **arguments).logits[:, :-1]
    losses = F.cross_entropy(logits.float().flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    kinds = batch.kinds[:, 1:].flatten()
    parts = [kinds == kind for kind in (TEXT, ANSWER)]
    return torch.stack([(losses * part).sum() / part.sum().clamp(min=1) for part in parts])


def learning_rate(stage: Stage, step: int, done: float) -> float:
    """Linear from the first rate of a stage to its last one, after a warm-up of 50 steps."""
    first, last = stage.rates
    rate = first + (last - first) * done
    return rate * min((step + 1) / 50, 1.0)


def add_dropout(model: nn.Module, p: float) -> None:
    """Dropout on what each attention and MLP adds to the residual stream, and on the embeddings, in training only.

    These are hooks, because the dropout belongs to this recipe and not to the architecture. (Dropout on attention
    probabilities would need `attention_dropout`. The CPU has no fused kernel for it: a step takes 7 times as long.)"""

    def drop(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return F.dropout(output, p, module.training)

    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj", "embed_tokens")) and "vision" not in name:
            module.register_forward_hook(drop)


@torch.no_grad()
def match_spread(model: Any, batch: Batch) -> None:
    """Scale the projector's last layer, so that the embeddings of images have the standard deviation of the others."""
    model.eval()
    features = torch.cat(model.model.get_image_features(pixel_values(batch.images)))
    embeddings = model.model.language_model.embed_tokens.weight
    model.model.multi_modal_projector.linear_2.weight.mul_(embeddings.std() / features.std())


def autocast(device: torch.device) -> torch.autocast:
    """Products in bfloat16 where they are faster than in float32: on GPUs, and on CPUs with instructions for them."""
    fast = device.type == "cuda"
    if device.type == "cpu":
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def device_name(device: torch.device) -> str:
    """The name of a device, for the log."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type


def save(model: Any, output: Path) -> None:
    """Write the model in bfloat16."""
    tensors = {name: p.detach().to("cpu", torch.bfloat16) for name, p in model.named_parameters()}
    copy = type(model)(model.config).to(torch.bfloat16)
    copy.load_state_dict(tensors, strict=False)
    copy.generation_config = GenerationConfig.from_pretrained(output)  # its settings were chosen by hand
    copy.save_pretrained(output)


def draw_curves(log: list[dict[str, Any]], path: Path) -> None:
    """Write the loss curves as an image, if Matplotlib is there."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print(f"{path} is not drawn: it needs Matplotlib")
        return
    entries = [entry for entry in log if "text" in entry]
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for name in ("text", "answers"):
        axes.plot(range(len(entries)), [entry[name] for entry in entries], label=name)
    for place, entry in enumerate(entries):
        if place == 0 or entries[place - 1]["stage"] != entry["stage"]:
            axes.axvline(place, color="grey", linewidth=0.5)
            axes.text(place, 0.02, f" {entry['stage']}", transform=axes.get_xaxis_transform())
    axes.set(xlabel=f"steps / {LOG_EVERY}", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(path)

"""Train a miniature in its stages.

Everything random comes from the seed, the stage and the step. So a run that is resumed is the same run."""

from __future__ import annotations

import io
import math
import pickle
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoint import GenerationConfig, read_json, replace_file, write_json
from fast import text_model
from tokenizer import TEKKEN, Tokenizer, from_tekken
from training import corpus
from training.bits import bits_per_byte
from training.optimizer import make_optimizers
from training.recipes import Recipe
from training.rows import ANSWER, TEXT, Batch, Rows, Stage, pixel_values
from training.shapes import CLASSES
from training.tasks import TASKS, Draw, Plays, conversation
from training.vocabulary import as_v3, learn

LOG_EVERY = 100  # steps
SAVE_EVERY = 30  # seconds
VALIDATE_EVERY = 500  # steps
LOSSES: tuple[str, ...] = ("text", "answers")
TOWER_LOSSES: tuple[str, ...] = ("patches",)  # of the vision tower, which learns alone


@dataclass
class Progress:
    """How far a run has come."""

    stage: int = 0
    step: int = 0
    seconds: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)


class Tower(nn.Module):
    """The vision tower, the first half of the projector, and a linear layer that names the class of each merged patch.

    The linear layer is not kept."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.head = nn.Linear(self.tower.config.hidden_size, CLASSES)

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
        compiled: compile the decoder and the loss with torch.compile.
    """

    def __init__(
        self, recipe: Recipe, output: Path, device: torch.device, workers: int = 0, compiled: bool = False
    ) -> None:
        self.recipe, self.output, self.device = recipe, output, device
        self.workers, self.compiled = workers, compiled
        self.losses_by_kind: Any = losses_by_kind
        if compiled:
            self.losses_by_kind = torch.compile(losses_by_kind, dynamic=False)
        output.mkdir(parents=True, exist_ok=True)
        self.texts = corpus.load()
        self.plays = Plays.of(self.texts["train"], self.texts["test"])
        if not (output / TEKKEN).exists():
            write_json(output / TEKKEN, vocabulary(self.texts["train"], recipe))
        tekken = read_json(output / TEKKEN)
        self.tokenizer = Tokenizer(from_tekken(tekken), tekken["config"]["version"])
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
            model = self.recipe.model(stage).to(self.device)
            if weights is not None:
                model.load_state_dict(weights)
            self.run_stage(stage, model, state)
            if stage.images:
                match_spread(model, self.rows(stage, model)[0].to(self.device))
            self.validate(model)
            self.progress.stage += 1
            self.progress.step = 0
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
        if self.compiled and not stage.images:
            text_model(model).compile(dynamic=False)
        optimizers = make_optimizers(module)
        if state.get("optimizers"):
            module.load_state_dict(state["module"])
            for optimizer, saved in zip(optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)

        # `collate_fn=tuple` keeps NumPy arrays, which workers send through pipes. The default makes tensors of them,
        # which need shared memory.
        steps = range(self.progress.step, stage.steps)
        loader = DataLoader(
            self.rows(stage, model), batch_size=None, sampler=steps, num_workers=self.workers, collate_fn=tuple
        )
        losses: list[Tensor] = []
        say(f"{self.recipe.kind} {stage.name}: from step {steps.start} of {stage.steps}, in {self.output}")
        bar = tqdm(loader, stage.name, stage.steps, leave=False, initial=steps.start, disable=None)
        started = saved = time.monotonic()
        for arrays in bar:
            losses.append(self.step(stage, module, optimizers, Batch(*arrays).to(self.device)))
            self.progress.step += 1
            step = self.progress.step
            if step % LOG_EVERY == 0 or step == stage.steps:
                self.report(stage, torch.stack(losses).mean(dim=0).tolist(), len(losses) / (time.monotonic() - started))
                losses.clear()
                started = time.monotonic()
            if step % VALIDATE_EVERY == 0 and step < stage.steps and not stage.images:
                self.validate(model)
            if time.monotonic() - saved > SAVE_EVERY:
                self.save_state(model, module, optimizers)
                saved = time.monotonic()

    def step(self, stage: Stage, module: nn.Module, optimizers: list[Any], batch: Batch) -> Tensor:
        """One update. Returns the losses of text and of answers (2,), or for the tower that of the patches (1,)."""
        step = self.progress.step
        module.train()
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.progress.stage * 100_000 + step)
        with autocast(self.device):
            if stage.images:
                logits = module(pixel_values(batch.images)).float()
                losses = F.cross_entropy(logits, batch.ids.flatten())[None]
            else:
                arguments: dict[str, Any] = {"use_cache": False, "return_dict": True}
                if len(batch.images):
                    arguments["pixel_values"] = pixel_values(batch.images)
                logits = module(batch.ids, **arguments).logits
                losses = self.losses_by_kind(logits, batch.ids, batch.kinds)
        update(module, optimizers, losses.mean(), learning_rate(stage, step))
        return losses.detach()

    def report(self, stage: Stage, losses: list[float], steps_per_second: float) -> None:
        """Print and log a line."""
        now = time.monotonic()
        self.progress.seconds += now - self.last
        self.last = now
        names = LOSSES
        if stage.images:
            names = TOWER_LOSSES
        step, seconds = self.progress.step, round(self.progress.seconds)
        entry = {"stage": stage.name, "step": step, **dict(zip(names, losses)), "seconds": seconds}
        self.progress.log.append(entry)
        shown = "".join(f"{name} {loss:.4f}, " for name, loss in zip(names, losses))
        say(f"{self.recipe.kind} {stage.name} {step}/{stage.steps}: {shown}{steps_per_second:.2f} steps/s, {seconds} s")

    @torch.no_grad()
    def validate(self, model: Any) -> None:
        """Print and log the bits per byte of the beginning of the validation play."""
        model.eval()
        with autocast(self.device), torch.compiler.set_stance("force_eager"):
            score = bits_per_byte(model, self.tokenizer, [self.texts["validation"][0][:40000]], 1024)
        stage = self.recipe.stages[self.progress.stage].name
        self.progress.log.append({"stage": stage, "step": self.progress.step, "bits_per_byte": score})
        say(f"{self.recipe.kind} {stage}: {score:.4f} bits per byte of the validation play")

    def save_state(self, model: Any, module: nn.Module, optimizers: list[Any]) -> None:
        """Write all that a run needs to go on, and the log."""
        state: dict[str, Any] = {"model": model.state_dict(), "module": module.state_dict()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        state |= {"progress": asdict(self.progress), "recipe": repr(self.recipe)}
        record = {"recipe": asdict(self.recipe), "torch": torch.__version__, "device": self.device.type}
        # Before the state: a run that ends in between goes on from the state before, and writes the log again.
        write_json(self.output / "training_log.json", record | {"log": self.progress.log})
        buffer = io.BytesIO()  # torch.save into a file does not say that the disk is full
        torch.save(state, buffer)
        replace_file(self.output / "state.pt", lambda temporary: temporary.write_bytes(buffer.getbuffer()))

    def load_state(self) -> dict[str, Any]:
        """Read the saved state, and set `progress`; {} if there is none."""
        path = self.output / "state.pt"
        if not path.exists():
            return {}
        try:
            state = dict(torch.load(path, map_location=self.device, weights_only=True))
            recipe, self.progress = state["recipe"], Progress(**state["progress"])
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}); remove it to begin anew") from error
        if recipe != repr(self.recipe):
            raise ValueError(f"{path} belongs to another recipe; choose another --output or remove it")
        return state


def say(line: str) -> None:
    """Print a line above the progress bar."""
    with tqdm.external_write_mode():
        print(line, flush=True)


def vocabulary(texts: list[str], recipe: Recipe) -> dict[str, Any]:
    """The tekken.json that is learned from texts and from sample conversations about them."""
    draw = Draw(f"{recipe.seed} vocabulary", Plays.of(texts))
    shares = dict.fromkeys((*TASKS, "tool"), 1.0)
    samples = [conversation(draw, shares, 2500).text for _ in range(150)]
    tekken = learn([*texts, *samples], recipe.vocab_size)
    if recipe.kind != "ministral3":
        return as_v3(tekken)
    return tekken


def losses_by_kind(logits: Tensor, ids: Tensor, kinds: Tensor) -> Tensor:
    """logits (R, L, V), ids (R, L), kinds (R, L) -> the mean losses of the text and of the answers (2,)."""
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    kinds = kinds[:, 1:].flatten()
    parts = [kinds == kind for kind in (TEXT, ANSWER)]
    return torch.stack([(losses * part).sum() / part.sum().clamp(min=1) for part in parts])


def update(module: nn.Module, optimizers: list[Any], loss: Tensor, rate: float) -> None:
    """One update of all parameters that have gradients, at a learning rate."""
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def learning_rate(stage: Stage, step: int) -> float:
    """Linear from the first rate of a stage to its last one, after a warm-up of 50 steps."""
    first, last = stage.rates
    rate = first + (last - first) * step / stage.steps
    return rate * min((step + 1) / 50, 1.0)


def add_dropout(model: nn.Module, p: float) -> None:
    """Dropout on what each attention and MLP adds to the residual stream, and on the embeddings, in training only.

    These are hooks, because the dropout belongs to this recipe and not to the architecture. (Dropout on attention
    probabilities would need `attention_dropout`. The CPU has no fused kernel for it: a step takes 7 times as long.)"""
    if p == 0:
        return

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


def save(model: Any, output: Path) -> None:
    """Write the model in bfloat16. A generation_config.json that is in the directory stays; without one, the model is
    greedy."""
    tensors = {name: p.detach().to("cpu", torch.bfloat16) for name, p in model.named_parameters()}
    copy = type(model)(model.config).to(torch.bfloat16)
    copy.load_state_dict(tensors, strict=False)  # a tied output projection has no entry of its own
    copy.generation_config = GenerationConfig.from_pretrained(output)
    copy.save_pretrained(output)


def draw_curves(log: list[dict[str, Any]], path: Path) -> None:
    """Write the loss curves as an image, if Matplotlib is installed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print(f"{path} is not drawn: it needs Matplotlib")
        return
    entries = [entry for entry in log if "seconds" in entry]
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for name in LOSSES + TOWER_LOSSES:
        values = [entry.get(name, math.nan) for entry in entries]
        axes.plot(range(len(entries)), values, label=name)
    for place, entry in enumerate(entries):
        if place == 0 or entries[place - 1]["stage"] != entry["stage"]:
            axes.axvline(place, color="grey", linewidth=0.5)
            axes.text(place, 0.02, entry["stage"], rotation=90, transform=axes.get_xaxis_transform())
    axes.set(xlabel=f"steps / {LOG_EVERY}", ylabel="loss", yscale="log")
    axes.legend()
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png"))

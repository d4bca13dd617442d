"""LoRA: fine-tune the bundled model with low-rank adapters, in 95 seconds on one CPU core.

    python -m examples.lora [--seed N] [--save DIR]

A linear layer computes W x. With an adapter it computes

    W x + (alpha / r) B A x        W (out, in), A (r, in), B (out, r)

W is frozen; A and B are trained. B A has the shape of W and at most rank r. With out = in = 256 and r = 8, W has 65,536
numbers, A and B together 4,096. Only these have gradients and optimizer states. A starts random and B with zeros. B A
is then zero, so training starts at the base model. (With A zero as well, all gradients would be zero.) At the end,
W + (alpha / r) B A replaces W, and the model has its old shape and speed. Source: https://arxiv.org/abs/2106.09685.

The task is the spelling of 1623. The bundled model was trained on a modern edition. The printers of Shakespeare's time
used the letters u, v, i and j in another way: "vpon my soule, I haue iudged". The adapter is trained on the training
plays in this spelling, and tested on parts of two plays that neither the model nor the adapter has seen. In modern
spelling the model needs 1.761 bits per byte for them. This is the target: only the spelling differs.

DIR is a directory that PEFT reads. `python -m checkpoint merge DIR models/ministral3 OUT` writes the merged model.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import write_json
from cli import Parser, exit_code
from ministral3 import Ministral3ForCausalLM
from model_types import BUNDLED
from tokenizer import Tokenizer
from training import corpus
from training.bits import bits_per_byte

# All matrices of a layer.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROW = 512  # tokens of a text in training


def spelling_of_1623(text: str) -> str:
    """A text in the letters of the first printers: v for u at the beginning of a word and u for v inside, V for U, and
    i for j ("vpon", "haue", "ioy")."""
    text = re.sub(r"\Bv", "u", re.sub(r"\bu", "v", text))
    return text.translate(str.maketrans("jJU", "iIV"))


class LoraLinear(nn.Module):
    """A linear layer with an adapter. The names of its parts are PEFT's."""

    def __init__(self, base_layer: nn.Linear, r: int, alpha: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, r, bias=False)
        self.lora_B = nn.Linear(r, base_layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.alpha = alpha
        self.scaling = alpha / r

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.base_layer(x) + self.lora_B(self.lora_A(x)) * self.scaling


def add_adapters(model: nn.Module, r: int = 8, alpha: float = 16) -> None:
    """Freeze all parameters, then add adapters to the layers of `TARGETS`. Only their parameters are not frozen."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(TARGETS):
            model.set_submodule(name, LoraLinear(module, r, alpha))


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add each low-rank product to its weight, and remove the adapters."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            module.base_layer.weight += module.lora_B.weight @ module.lora_A.weight * module.scaling
            model.set_submodule(name, module.base_layer)


def save_adapters(model: nn.Module, directory: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json, as PEFT reads them. r and alpha are those of the first
    adapter."""
    tensors = {"base_model.model." + name: t for name, t in model.state_dict().items() if ".lora_" in name}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    lora = next(module for module in model.modules() if isinstance(module, LoraLinear))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(BUNDLED),
              "r": lora.lora_A.out_features, "lora_alpha": lora.alpha, "target_modules": TARGETS}  # fmt: skip
    write_json(directory / "adapter_config.json", config)


def random_rows(tokenizer: Tokenizer, works: list[str], count: int) -> Tensor:
    """Pieces of `ROW` tokens of the works, (count, ROW)."""
    ids = torch.cat([torch.tensor(tokenizer.encode(work)) for work in works])
    starts = torch.randint(len(ids) - ROW, (count, 1))
    return ids[starts + torch.arange(ROW)]


def fine_tune(model: nn.Module, rows: Tensor, learning_rate: float = 1e-2, batch_size: int = 2) -> None:
    """Train all parameters that are not frozen. The learning rate falls linearly to zero."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    batches = torch.split(rows, batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(batches))
    model.train()
    for ids in tqdm(batches, unit="step"):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def main(steps: int = 100) -> int:
    """Train, save and merge; print the held-out bits per byte before and after. Returns the exit code."""
    parser = Parser(prog="python -m examples.lora", description="Fine-tune the bundled model with LoRA.")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--save", type=Path, default="runs/lora", metavar="DIR", help="default: runs/lora")
    options = parser.parse_args()
    options.save.mkdir(parents=True, exist_ok=True)

    # Data
    print("measuring the model on held-out plays ...", file=sys.stderr)
    texts = {part: list(map(spelling_of_1623, works)) for part, works in corpus.load().items()}
    held_out = [play[20_000:50_000] for play in texts["test"]]  # 30,000 characters of each, to save time
    tokenizer = Tokenizer.from_dir(BUNDLED)
    model = Ministral3ForCausalLM.from_pretrained(BUNDLED, torch.float32)
    before = bits_per_byte(model, tokenizer, held_out, 1024)
    print(f"held-out bits per byte before: {before:.3f}", flush=True)

    # Adapters
    torch.manual_seed(options.seed)
    add_adapters(model)

    # Training
    fine_tune(model, random_rows(tokenizer, texts["train"], 2 * steps))

    # Merge
    save_adapters(model, options.save)
    merge_adapters(model)
    after = bits_per_byte(model, tokenizer, held_out, 1024)
    print(f"after: {after:.3f}; the adapter is in {options.save}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))

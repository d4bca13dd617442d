"""Verse or prose? The bundled language model becomes a classifier, in about three minutes on one CPU core.

    python -m examples.verse [--seed N]

Shakespeare's plays mix blank verse and prose, and the layout shows which is which: every line of verse begins with a
capital, and a line of prose ends at the margin. Speeches are labelled by that rule. Then the layout is removed: lines
are joined and their capitals lowered, so that only rhythm and words are left. The classifier is trained on the works
that the language model was trained on. It is tested on two plays that neither of them has seen.
"""

from __future__ import annotations

import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from cli import Parser, exit_code
from heads import Ministral3ForSequenceClassification
from model_types import BUNDLED
from tokenizer import Tokenizer
from training import corpus

LABELS = {0: "prose", 1: "verse"}
TOKENS = 96  # of each speech, from its beginning
Speech = tuple[str, int]


def lower_case_words(works: list[str]) -> set[str]:
    """Words that are not names: inside lines they are in lower case more often than capitalised."""
    lower: Counter[str] = Counter()
    capitalised: Counter[str] = Counter()
    for work in works:
        for word in re.findall(r"(?<=[a-z,;:] )[A-Za-z]+", work):
            if word[0].islower():
                lower[word.lower()] += 1
            else:
                capitalised[word.lower()] += 1
    return {word for word in lower if lower[word] > capitalised[word]}


def speeches(work: str, lower_case: set[str]) -> Iterator[Speech]:
    """Text without layout, and label, of every speech that has at least four lines and is clearly verse or prose."""
    play = re.split(r"\bact i\b", work, maxsplit=1, flags=re.IGNORECASE)[-1]  # without the list of persons
    for block in re.sub(r"\[.*?\]", "", play, flags=re.DOTALL).split("\n\n"):  # without stage directions
        speaker, *lines = [line.strip() for line in block.strip().split("\n")]
        if len(lines) < 4 or not re.fullmatch(r"[A-Z][A-Za-z' ]{,30}[.:]?", speaker):
            continue
        others = len(lines) - 1  # the first line begins with a capital in prose, too
        capitals = sum(re.match(r"[^a-zA-Z]*[A-Z]", line) is not None for line in lines[1:])
        if others / 3 < capitals < others:
            continue
        yield join(lines, lower_case), int(capitals == others)


def join(lines: list[str], lower_case: set[str]) -> str:
    """The lines as running text. A word at the beginning of a line loses its capital, unless it is a name or begins a
    sentence."""
    text = lines[0]
    for line in lines[1:]:
        first = re.match(r"\W*(\w+)", line)
        sentence_ended = re.search(r"[.?!]\W*$", text)
        if first and first[1].lower() in lower_case and not sentence_ended:
            start = first.start(1)
            line = line[:start] + line[start].lower() + line[start + 1 :]
        text += " " + line
    return text


def to_tensors(tokenizer: Tokenizer, batch: list[Speech], pad: int) -> tuple[Tensor, Tensor]:
    """Ids (B, S), padded on the right, and labels (B,)."""
    rows = [torch.tensor(tokenizer.encode(text)[:TOKENS]) for text, _ in batch]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    return ids, torch.tensor([label for _, label in batch])


def fine_tune(
    model: Ministral3ForSequenceClassification, tokenizer: Tokenizer, examples: list[Speech], epochs: int = 2,
    batch_size: int = 32, learning_rate: float = 1e-3, seed: int = 0,
) -> None:  # fmt: skip
    """Train all weights. Each epoch has all examples of the rarer class, and as many of the other."""
    rng = random.Random(seed)
    pad = model.config.pad_token_id
    classes = [[example for example in examples if example[1] == label] for label in LABELS]
    rare, common = sorted(classes, key=len)
    order: list[Speech] = []
    for _ in range(epochs):
        epoch = rare + rng.sample(common, len(rare))
        order += rng.sample(epoch, len(epoch))
    bar = tqdm(range(0, len(order), batch_size), unit="step")
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(bar))
    for start in bar:
        ids, labels = to_tensors(tokenizer, order[start : start + batch_size], pad)
        loss = model(ids, attention_mask=ids != pad, labels=labels, return_dict=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


@torch.inference_mode()
def probabilities(
    model: Ministral3ForSequenceClassification, tokenizer: Tokenizer, examples: list[Speech]
) -> Tensor:
    """The probability that each speech is verse, (number of speeches,)."""
    pad = model.config.pad_token_id
    batches = []
    for start in range(0, len(examples), 64):
        ids, _ = to_tensors(tokenizer, examples[start : start + 64], pad)
        logits = model(ids, attention_mask=ids != pad, return_dict=True).logits
        batches.append(logits.softmax(-1)[:, 1])
    return torch.cat(batches)


def load_data() -> tuple[list[Speech], list[Speech]]:
    """Speeches to train on, and those of the held-out plays."""
    texts = corpus.load()
    lower_case = lower_case_words(texts["train"])
    train = [speech for work in texts["train"] for speech in speeches(work, lower_case)]
    test = [speech for work in texts["test"] for speech in speeches(work, lower_case)]
    return train, test


def main() -> int:
    """Fine-tune; print the accuracy on the held-out plays, and that of always choosing the more frequent class. Returns
    the exit code."""
    description = "Fine-tune the bundled model to tell verse from prose."
    parser = Parser(prog="python -m examples.verse", description=description)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    seed = parser.parse_args().seed
    start = time.monotonic()
    torch.manual_seed(seed)
    train, test = load_data()
    tokenizer = Tokenizer.from_dir(BUNDLED)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*has no score.weight")  # as intended: the layer is new
        model = Ministral3ForSequenceClassification.from_pretrained(BUNDLED, torch.float32, id2label=LABELS)
    print(f"{len(train)} speeches to learn from, {len(test)} of two unseen plays to be tested on")
    fine_tune(model, tokenizer, train, seed=seed)
    verse = probabilities(model, tokenizer, test)
    labels = torch.tensor([label for _, label in test])
    right = ((verse > 0.5) == labels).float().mean().item()
    majority = max((labels == label).float().mean().item() for label in LABELS)
    for i in range(0, len(test), len(test) // 8):
        print(f"{verse[i]:4.0%} verse, is {LABELS[test[i][1]]}: {test[i][0][:80]}")
    print(f"held-out accuracy {right:.1%}; always the more frequent class: {majority:.1%}; ", end="")
    print(f"{time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""Verse or prose? The bundled language model becomes a classifier, in 75 seconds on two CPU cores.

    python -m examples.verse [--seed N]

Shakespeare's plays mix blank verse and prose, and their layout tells which is which: a line of verse begins with a
capital, a line of prose ends where the page does. Speeches are labelled by that rule; then the layout is taken away,
lines joined and their capitals lowered, so that only rhythm and words are left to judge by. The model learns from the
works that the language model was trained on. It is tested on two plays that neither of them has seen.
"""

from __future__ import annotations

import argparse
import random
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from generate import BUNDLED
from heads import Ministral3ForSequenceClassification
from tokenizer import Tokenizer
from training import corpus

LABELS = {0: "prose", 1: "verse"}
TOKENS = 96  # of each speech, from its beginning
Speech = tuple[str, int]


def lower_case_words(works: list[str]) -> set[str]:
    """Words that are no names: inside lines they are written small more often than not."""
    small: Counter[str] = Counter()
    for work in works:
        for word in re.findall(r"(?<=[a-z,;:] )[A-Za-z]+", work):
            small[word.lower()] += 1 if word[0].islower() else -1
    return {word for word, count in small.items() if count > 0}


def speeches(work: str, small: set[str]) -> Iterator[Speech]:
    """Text without layout, and label, of every speech with at least four lines and one clear layout."""
    play = re.split(r"\bact i\b", work, maxsplit=1, flags=re.IGNORECASE)[-1]  # without the list of persons
    for block in re.sub(r"\[.*?\]", "", play, flags=re.DOTALL).split("\n\n"):  # without stage directions
        speaker, *lines = [line.strip() for line in block.strip().split("\n")]
        if len(lines) < 4 or not re.fullmatch(r"[A-Z][A-Za-z' ]{,30}[.:]?", speaker):
            continue
        capitals = sum(re.match(r"[^a-zA-Z]*[A-Z]", line) is not None for line in lines[1:])
        if len(lines[1:]) / 3 < capitals < len(lines[1:]):
            continue
        text = lines[0]
        for line in lines[1:]:
            first = re.match(r"\W*(\w+)", line)
            if first and first[1].lower() in small and not re.search(r"[.?!]\W*$", text):
                line = line[: first.start(1)] + line[first.start(1) :][0].lower() + line[first.start(1) + 1 :]
            text += " " + line
        yield text, int(capitals == len(lines[1:]))


def to_tensors(tokenizer: Tokenizer, batch: list[Speech], pad: int) -> tuple[Tensor, Tensor]:
    """Ids (B, S), padded on the right, and labels (B,)."""
    rows = [torch.tensor(tokenizer.encode(text)[:TOKENS]) for text, _ in batch]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    return ids, torch.tensor([label for _, label in batch])


def fine_tune(
    model: Ministral3ForSequenceClassification, tokenizer: Tokenizer, examples: list[Speech], epochs: int = 2,
    batch_size: int = 32, learning_rate: float = 1e-3, seed: int = 0,
) -> None:  # fmt: skip
    """Train all weights. Each epoch takes all examples of the rarer class, and as many of the other."""
    rng, pad = random.Random(seed), model.config.pad_token_id
    rare, common = sorted(([e for e in examples if e[1] == label] for label in LABELS), key=len)
    order: list[Speech] = []
    for _ in range(epochs):
        epoch = rare + rng.sample(common, len(rare))
        order += rng.sample(epoch, len(epoch))
    starts = range(0, len(order), batch_size)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(starts))
    for start in (bar := tqdm(starts, unit="step")):
        ids, labels = to_tensors(tokenizer, order[start : start + batch_size], pad)
        loss = model(ids, attention_mask=ids != pad, labels=labels).loss
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
    """How likely each speech is to be verse, (number of speeches,)."""
    pad, found = model.config.pad_token_id, []
    for start in range(0, len(examples), 64):
        ids, _ = to_tensors(tokenizer, examples[start : start + 64], pad)
        found.append(model(ids, attention_mask=ids != pad).logits.softmax(-1)[:, 1])
    return torch.cat(found)


def load_data() -> tuple[list[Speech], list[Speech]]:
    """Speeches to learn from, and those of the held-out plays."""
    texts = corpus.load()
    small = lower_case_words(texts["train"])
    train, test = ([s for work in texts[part] for s in speeches(work, small)] for part in ("train", "test"))
    return train, test


def main() -> None:
    """Fine-tune, and print the accuracy on the held-out plays beside the majority baseline."""
    parser = argparse.ArgumentParser(description="Fine-tune the bundled model to tell verse from prose.")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    seed, began = parser.parse_args().seed, time.monotonic()
    torch.manual_seed(seed)
    train, test = load_data()
    tokenizer = Tokenizer.from_dir(BUNDLED)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*has no score.weight")  # that is the plan
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
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()

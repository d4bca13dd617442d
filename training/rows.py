"""The rows of tokens of each training step: text, and conversations in the layout of the tokenizer."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from images import MEAN, STD, image_tokens
from tokenizer import Tokenizer
from training.shapes import SIZE, draw_shapes, paint, patch_labels
from training.tasks import Draw, Plays, conversation

IGNORED, TEXT, ANSWER = 0, 1, 2  # the kinds of a token: not learned, text, part of an answer
CHARACTERS_OF_A_TOKEN = 2.4  # in conversations; seldom fewer
PASSAGE_CHARACTERS_OF_A_TOKEN = 2.75  # limits the length of a passage, so that it fits into a row
Array = NDArray[Any]


@dataclass(frozen=True)
class Stage:
    """A stage of training.

    Attributes:
        steps: how many updates.
        rates: the learning rates at the first and the last step.
        tokens: the tokens of a step.
        row: the tokens of a row.
        text: the share of rows that are text.
        shares: how often each task is drawn, see `tasks.conversation`.
        long_every: every step whose number this divides has rows of 4096 tokens, with recall only; 0: none.
        images: a step trains the vision tower alone on so many images; 0: it trains the language model.
        factor: how far YaRN stretches the original context.
        window: of the sliding layers.
        dropout: on the embeddings and on what each attention and MLP adds to the residual stream.
    """

    name: str
    steps: int
    rates: tuple[float, float]
    tokens: int = 8192
    row: int = 1024
    text: float = 0.5
    shares: dict[str, float] = field(default_factory=dict)
    long_every: int = 0
    images: int = 0
    factor: float = 16.0
    window: int = 64
    dropout: float = 0.1


class Batch(NamedTuple):
    """The input of a step, as arrays or tensors.

    ids (R, L), their kinds (R, L), and the images (N, SIZE, SIZE, 3) in the rows. For the vision tower, ids are the
    classes of the merged patches (N, patches)."""

    ids: Any
    kinds: Any
    images: Any

    def to(self, device: torch.device) -> Batch:
        """The arrays as tensors on a device."""
        ids, kinds, images = (torch.from_numpy(part).to(device) for part in self)
        return Batch(ids.long(), kinds, images)


class Rows(Dataset[Batch]):
    """The batch of each step of a stage. Everything random comes from the seed, the stage and the step.

    Args:
        stream: the ids of all plays in a row.
        config: of the model.
    """

    def __init__(self, stage: Stage, plays: Plays, stream: Array, tokenizer: Tokenizer, config: Any, seed: int) -> None:
        self.stage, self.plays, self.stream, self.tokenizer, self.config = stage, plays, stream, tokenizer, config
        self.seed = f"{seed} {stage.name}"
        special = tokenizer.special_tokens
        self.begins = [special["[/INST]"], special["[/TOOL_RESULTS]"]]
        self.bos, self.end, self.padding = special["<s>"], special["</s>"], special["<pad>"]

    def __getitem__(self, step: int) -> Batch:
        stage = self.stage
        if stage.images:
            return self.tower_batch(step)
        row, shares = stage.row, stage.shares
        if stage.long_every and step % stage.long_every == 0:
            row, shares = 4096, {"recall": 1.0}
        count = max(stage.tokens // row, 2)
        texts = count
        if shares:
            texts = max(round(count * stage.text), 1)
        ids = np.full((count, row), self.padding, np.int32)
        kinds = np.full((count, row), IGNORED, np.uint8)
        ids[:texts] = text_rows(self.stream, step * texts, texts, row, self.seed)
        ids[:texts:2, 0] = self.bos  # in half of the rows, so that the model continues texts with and without <s>
        kinds[:texts] = TEXT
        images: list[Array] = []
        for place in range(texts, count):
            draw = Draw(f"{self.seed} {step} {place}", self.plays, limit=row * PASSAGE_CHARACTERS_OF_A_TOKEN)
            tokens, own_images = self.conversation_row(draw, shares, row)
            ids[place, : len(tokens)] = tokens
            kinds[place, : len(tokens)] = self.kinds_of(tokens)
            images += own_images
        return Batch(ids, kinds, stack(images))

    def conversation_row(self, draw: Draw, shares: dict[str, float], row: int) -> tuple[Array, list[Array]]:
        """The ids of a conversation of at most `row` tokens, cut after an answer, and its images."""
        while True:
            made = conversation(draw, shares, int(row * CHARACTERS_OF_A_TOKEN))
            # encode_chat takes an answer at the end as a prefix, without the </s> that is added here.
            messages = [*made.messages[:-1], {**made.messages[-1], "prefix": True}]
            ids, images = encode_prompt(messages, made.tools, self.tokenizer, self.config)
            tokens = np.array([*ids, self.end])
            ends = np.flatnonzero(tokens[:row] == self.end)
            if len(ends):  # else the first passage is too long for the row, and another is drawn
                tokens = tokens[: ends[-1] + 1]
                present = int((tokens == self.tokenizer.special_tokens["[IMG_END]"]).sum())
                return tokens, images[:present]

    def kinds_of(self, tokens: Array) -> Array:
        """The kind of each token of a conversation: ANSWER after [/INST] or [/TOOL_RESULTS], up to </s>."""
        places = np.arange(len(tokens))
        begin = np.maximum.accumulate(np.where(np.isin(tokens, self.begins), places, -1))
        end = np.maximum.accumulate(np.where(tokens == self.end, places, -1))
        inside = np.concatenate(([False], (begin > end)[:-1]))
        return np.where(inside, ANSWER, IGNORED)

    def tower_batch(self, step: int) -> Batch:
        """Images, and the classes of their merged patches."""
        draw = Draw(f"{self.seed} {step}", self.plays)
        images, labels = [], []
        patch = self.config.vision_config.patch_size * self.config.spatial_merge_size
        for _ in range(self.stage.images):
            shapes = draw.fresh(lambda: draw_shapes(draw))
            images.append(paint(shapes, draw))
            labels.append(patch_labels(shapes, images[-1], patch))
        ids = np.stack(labels)
        return Batch(ids, np.zeros_like(ids), stack(images))


def text_rows(stream: Array, first: int, count: int, row: int, seed: str) -> Array:
    """Rows of text (count, row): those from number `first` on, of an endless sequence. In it, each epoch has all rows
    in another order, cut at other places."""
    per_epoch = len(stream) // row - 1
    rows = []
    for number in range(first, first + count):
        epoch, place = divmod(number, per_epoch)
        generator = np.random.default_rng([zlib.crc32(seed.encode()), epoch])
        shift = generator.integers(row)
        start = generator.permutation(per_epoch)[place] * row + shift
        rows.append(stream[start : start + row])
    return np.stack(rows)


def encode_prompt(messages: Any, tools: Any, tokenizer: Tokenizer, config: Any) -> tuple[list[int], list[Array]]:
    """The ids of a conversation up to where the answer begins, and its images."""
    images: list[Array] = []

    def encode_image(source: Array) -> list[int]:
        images.append(source)
        special = tokenizer.special_tokens
        return image_tokens((SIZE, SIZE), config, special["[IMG_BREAK]"], special["[IMG_END]"])

    return tokenizer.encode_chat(messages, tools, encode_image), images


def stack(images: list[Array]) -> Array:
    """Images as one array (N, SIZE, SIZE, 3) of bytes."""
    return np.array(images, np.uint8).reshape(-1, SIZE, SIZE, 3)


def pixel_values(images: Tensor) -> Tensor | None:
    """Pixels as `images.preprocess` makes them: (N, SIZE, SIZE, 3) bytes -> float32 (N, 3, SIZE, SIZE)."""
    if len(images) == 0:
        return None
    mean = torch.tensor(MEAN, device=images.device)
    std = torch.tensor(STD, device=images.device)
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()

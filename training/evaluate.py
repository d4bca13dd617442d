"""Measure a miniature on held-out data, beside baselines."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from checkpoint import write_json
from generate import generate
from model_types import load_model
from tokenizer import Tokenizer
from training import corpus, tasks
from training.bits import bits_per_byte, ngram_bits_per_byte
from training.rows import encode_prompt, pixel_values, stack
from training.tasks import STYLES, TOOLS, Conversation, Draw, Messages, Plays

LONGEST_ANSWER = 300  # tokens, with thinking
BATCH = 128  # prompts that are read together, at most
BATCH_TOKENS = 2**17  # tokens of these prompts together, with padding, at most
YARN_VARIANTS: dict[str, dict[str, Any]] = {
    "as trained": {},
    "factor 4": {"factor": 4.0},
    "factor 1": {"rope_type": "default"},
    "without the query scale": {"llama_4_scaling_beta": 0.0},
    "magnitude 1.277": {"attention_factor": 1.2772588722239782, "mscale": None, "mscale_all_dim": None},
}


class Item(NamedTuple):
    """A question: the messages up to the answer, the tools, and the right answer."""

    messages: Messages
    tools: Any
    answer: dict[str, Any]


def items(made: Conversation) -> Iterator[Item]:
    """Each answer of a conversation as a question, with the right answers before it."""
    for place, message in enumerate(made.messages):
        if message["role"] == "assistant":
            yield Item(made.messages[:place], made.tools, message)


def text_of(message: dict[str, Any]) -> str:
    """The words of an answer, without thinking."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def calls_of(message: dict[str, Any]) -> list[Any]:
    """The calls of an answer."""
    return [call["function"] for call in message.get("tool_calls", ())]


def is_right(answer: dict[str, Any], item: Item) -> bool:
    """Whether an answer has the words and the calls of the right one."""
    return text_of(answer) == text_of(item.answer) and calls_of(answer) == calls_of(item.answer)


def answers(model: Any, tokenizer: Tokenizer, asked: list[Item]) -> list[dict[str, Any]]:
    """The model's greedy answer to each question. Questions of about the same length are answered together."""
    padding = tokenizer.special_tokens["<pad>"]
    encoded = [encode_prompt(item.messages, item.tools, tokenizer, model.config) for item in asked]
    order = sorted(range(len(asked)), key=lambda place: len(encoded[place][0]))
    found: dict[int, dict[str, Any]] = {}
    bar = tqdm(total=len(asked), unit=" answers", leave=False, delay=2)
    while order:
        group = order[:BATCH]
        longest, _ = encoded[group[-1]]
        group = group[: max(BATCH_TOKENS // len(longest), 1)]
        order = order[len(group) :]
        rows = [torch.tensor(encoded[place][0]) for place in group]
        ids = pad_sequence(rows, batch_first=True, padding_value=padding, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        images = torch.from_numpy(stack([image for place in group for image in encoded[place][1]]))
        pixels = pixel_values(images.to(model.device))
        new = min(LONGEST_ANSWER, model.config.get_text_config().max_position_embeddings - ids.shape[1])
        inputs: dict[str, Any] = {"attention_mask": mask.to(model.device), "pixel_values": pixels}
        tokens = generate(model, ids.to(model.device), max_new_tokens=new, temperature=0, **inputs)
        for place, row in zip(group, tokens[:, ids.shape[1] :].tolist()):
            found[place] = tokenizer.decode_chat(row)
        bar.update(len(group))
    bar.close()
    return [found[place] for place in range(len(asked))]


def share(model: Any, tokenizer: Tokenizer, asked: list[Item]) -> float:
    """The share of questions whose answer is right."""
    return sum(map(is_right, answers(model, tokenizer, asked), asked)) / len(asked)


# ------------------------------------------------------------------------------------------------------- tasks


def questions(plays: Plays, count: int) -> dict[str, list[Item]]:
    """The questions of each task that are the test's."""
    makers: dict[str, tuple[Callable[[Draw], Conversation], str]] = {}
    for name in ("speaker", "next line", "recall", "sum", "refusal", "image"):
        makers[name] = partial(one_task, name), "plain"
    for name in ("image", "sum", "refusal"):
        makers[f"{name}, in capitals"] = partial(one_task, name), "capitals"
        makers[f"{name}, in one word"] = partial(one_task, name), "word"
    for name in TOOLS:
        makers[f"tool {name}"] = partial(one_tool, name), "plain"
    makers["no tool"] = no_tool, "plain"
    makers["after other turns"] = several_tasks, "plain"
    asked: dict[str, list[Item]] = {}
    for name, (make, style) in makers.items():
        draw = Draw(f"test {name}", plays, test=True, limit=2200, style=style)
        asked[name] = []
        while len(asked[name]) < count:
            made = make(draw)
            if style != "plain":
                system = {"role": "system", "content": draw.choice(STYLES[style])}
                made = made._replace(messages=[system, *made.messages])
            asked[name] += items(made)
        del asked[name][count:]
    return asked


def one_task(name: str, draw: Draw) -> Conversation:
    """The questions of one task."""
    return Conversation(tasks.TASKS[name](draw))


def one_tool(name: str, draw: Draw) -> Conversation:
    """A question that needs the tool, with up to three others beside it."""
    present = [name, *draw.sample([other for other in TOOLS if other != name], draw.randint(0, 3))]
    draw.shuffle(present)
    return Conversation(tasks.call(draw, name, present), [tasks.schema(tool) for tool in present])


def no_tool(draw: Draw) -> Conversation:
    """A question that needs a tool, without one."""
    return Conversation(tasks.call(draw, draw.choice(list(TOOLS)), ()))


def several_tasks(draw: Draw) -> Conversation:
    """Questions of five tasks, in any order, in one conversation."""
    chosen = draw.sample([tasks.addition, tasks.image, tasks.small_talk, tasks.recall, tasks.who_speaks], 5)
    draw.limit = 600
    return Conversation([message for task in chosen for message in task(draw)])


def last_seen(name: str, item: Item) -> str:
    """The answer of a program that copies the last thing of the right kind from the passage."""
    passages = [text_of(message) for message in item.messages if "\n" in text_of(message)]
    passage, _, _ = passages[-1].rpartition("\n\n")
    lines = passage.split("\n")
    if name == "speaker":
        lines = [block.split("\n")[0] for block in passage.split("\n\n")]
    if name == "recall":
        lines = [line for line in lines if line.startswith("The key of")]
    return lines[-1].rstrip()


def task_results(model: Any, tokenizer: Tokenizer, plays: Plays, count: int) -> dict[str, Any]:
    """The share of right answers of each task, with baselines."""
    table: dict[str, Any] = {}
    for name, asked in questions(plays, count).items():
        if model.config.model_type != "mistral3" and name != "recall":
            continue
        given = answers(model, tokenizer, asked)
        rights = Counter(repr((text_of(item.answer), calls_of(item.answer))) for item in asked)
        row = {"right": sum(map(is_right, given, asked)) / count, "majority": rights.most_common(1)[0][1] / count}
        if name in ("speaker", "next line", "recall"):
            row["last"] = sum(last_seen(name, item) == text_of(item.answer) for item in asked) / count
        wanted = [(answer, item) for answer, item in zip(given, asked) if calls_of(item.answer)]
        if wanted:
            row["parsed"] = sum(len(calls_of(answer)) == 1 for answer, _ in wanted) / len(wanted)
            row["calls"] = sum(is_right(answer, item) for answer, item in wanted) / len(wanted)
        table[name] = row
        print(f"{name:<30}" + "".join(f"{key} {value:.3f}  " for key, value in row.items()), flush=True)
    return table


# ----------------------------------------------------------------------------------------------------- context


def changed(model: Any, **rope: Any) -> Any:
    """The same weights with other entries of rope_parameters (None removes one)."""
    config = deepcopy(model.config)
    text = config.get_text_config()
    merged = text.rope_parameters | rope
    text.rope_parameters = {key: value for key, value in merged.items() if value is not None}
    other = type(model)(config).to(model.device, model.dtype).eval()
    other.load_state_dict(model.state_dict())
    other.generation_config = model.generation_config
    return other


def context_curve(model: Any, tokenizer: Tokenizer, plays: Plays, count: int, lengths: list[int]) -> dict[str, Any]:
    """Recall of a key hidden in a text, and bits per byte of a play, against the tokens of context."""
    rows: dict[str, Any] = {"context": lengths, "recall": [], "bits_per_byte": []}
    for length in lengths:
        draw = Draw(f"test recall {length}", plays, test=True)
        size = int((length - 60) * 2.7)  # characters
        hidden = [next(items(Conversation(tasks.recall(draw, size, keys=1)))) for _ in range(count)]
        rows["recall"].append(share(model, tokenizer, hidden))
        rows["bits_per_byte"].append(bits_per_byte(model, tokenizer, [plays.texts[0][:60000]], length))
    return rows


def distance_curve(model: Any, tokenizer: Tokenizer, plays: Plays, count: int, window: int) -> dict[str, Any]:
    """Recall of a key that stands so many windows before the question."""
    rows: dict[str, Any] = {"windows": [0.5, 1, 2, 3, 4, 5, 6, 8, 10, 12], "recall": []}
    for windows in rows["windows"]:
        draw = Draw(f"test distance {windows}", plays, test=True)
        asked: list[Item] = []
        while len(asked) < count:
            size = int((windows * window + 30) * 2.85)  # characters
            item = next(items(Conversation(tasks.recall(draw, size, keys=1, place=0.02))))
            name = text_of(item.answer).split(" is ")[0]
            text = text_of(item.messages[0])
            distance = len(tokenizer.encode(text[text.index(name) :], bos=False))
            if abs(distance - windows * window) < window / 2:
                asked.append(item)
        rows["recall"].append(share(model, tokenizer, asked))
    return rows


def report(directory: Path, device: torch.device, count: int, path: Path) -> None:
    """Print tables of a model's results, and write them as JSON.

    Args:
        count: questions of each task.
        path: the file that is written, after each part.
    """
    started = time.monotonic()
    model = load_model(directory, torch.float32, device)
    tokenizer = Tokenizer.from_dir(directory)
    texts = corpus.load()
    plays = Plays.of(texts["test"], texts["train"])
    text = model.config.get_text_config()
    results: dict[str, Any] = {"count": count, "torch": torch.__version__, "device": device.type}

    def keep(name: str, content: Any) -> None:
        results[name] = content
        results["seconds"] = round(time.monotonic() - started)
        write_json(path, results)
        print(f"{name}: {content}\n({results['seconds']} s)", flush=True)

    train_text = "".join(texts["train"])
    bits = {}
    for part in ("validation", "test"):
        ngram = ngram_bits_per_byte(train_text, "".join(texts[part]))
        bits[part] = {"model": bits_per_byte(model, tokenizer, texts[part], 1024), "5-gram": ngram}
    keep("bits_per_byte", bits)
    keep("tasks", task_results(model, tokenizer, plays, count))
    if model.config.model_type != "mistral3":
        keep("distance", distance_curve(model, tokenizer, plays, count, text.sliding_window))
        return
    lengths = [text.rope_parameters["original_max_position_embeddings"] * 2**power for power in range(5)]
    curves = {}
    for name, rope in YARN_VARIANTS.items():
        curves[name] = context_curve(changed(model, **rope), tokenizer, plays, max(count // 2, 2), lengths)
        keep("context", curves)

"""Measure a miniature on held-out data, beside baselines."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from checkpoint import write_json
from generate import generate
from model_types import load_model
from tokenizer import Tokenizer
from training import corpus
from training.bits import bits_per_byte, ngram_bits_per_byte, xz_bits_per_byte
from training.rows import CHARACTERS, stack, encode_prompt, pixel_values
from training.tasks import (
    STYLES,
    TOOLS,
    Conversation,
    Draw,
    Messages,
    Plays,
    addition,
    call,
    image,
    next_line,
    recall,
    schema,
    small_talk,
    speaker,
)

LONGEST_ANSWER = 100  # tokens
BATCH = 128  # prompts that are read together, at most
BATCH_TOKENS = 2**17  # of these
ARGUMENTS = {
    "weather": "listed words", "distance": "listed words", "multiply": "numbers", "timer": "numbers",
    "define": "free words",
}  # fmt: skip


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
    """The greedy answer of the model to each question. Questions of about the same length are answered together."""
    encoded = [encode_prompt(item.messages, item.tools, tokenizer, model.config) for item in asked]
    order = sorted(range(len(asked)), key=lambda place: len(encoded[place][0]))
    found: dict[int, dict[str, Any]] = {}
    while order:
        longest = len(encoded[order[min(BATCH, len(order)) - 1]][0])
        group = order[: max(min(BATCH, BATCH_TOKENS // longest), 1)]
        order = order[len(group) :]
        rows = [torch.tensor(encoded[place][0]).flip(0) for place in group]
        ids = pad_sequence(rows, batch_first=True, padding_value=11).flip(1)  # padding on the left
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).flip(1)
        images = torch.from_numpy(stack([image for place in group for image in encoded[place][1]]))
        pixels = pixel_values(images.to(model.device))
        new = min(LONGEST_ANSWER, model.config.get_text_config().max_position_embeddings - ids.shape[1])
        tokens = generate(model, ids, mask, max_new_tokens=new, temperature=0.0, pixel_values=pixels)
        for place, row in zip(group, tokens[:, ids.shape[1] :].tolist()):
            found[place] = tokenizer.decode_chat(row)
    return [found[place] for place in range(len(asked))]


def share(model: Any, tokenizer: Tokenizer, asked: list[Item], right: Callable[..., bool] = is_right) -> float:
    """The share of questions whose answer is right."""
    given = answers(model, tokenizer, asked)
    return sum(map(right, given, asked)) / len(asked)


# ------------------------------------------------------------------------------------------------------- tasks


def tool_conversation(draw: Draw, name: str) -> Conversation:
    """A question that needs the tool, with one to three others beside it."""
    present = [name, *draw.sample([other for other in TOOLS if other != name], draw.randint(0, 3))]
    draw.shuffle(present)
    return Conversation(call(draw, name, present), [schema(tool) for tool in present])


def questions(plays: Plays, count: int) -> dict[str, list[Item]]:
    """The questions of each task."""
    asked: dict[str, list[Item]] = {}

    def ask(name: str, make: Callable[[Draw], Conversation], style: str = "plain") -> None:
        draw = Draw(f"test {name}", plays, test=True, limit=2200)
        draw.style = style
        asked[name] = []
        while len(asked[name]) < count:
            made = make(draw)
            if style != "plain":
                system = {"role": "system", "content": draw.choice(STYLES[style])}
                made = made._replace(messages=[system, *made.messages])
            asked[name] += items(made)
        del asked[name][count:]

    for name, task in {"speaker": speaker, "next line": next_line, "recall": recall, "sum": addition}.items():
        ask(name, lambda draw, task=task: Conversation(task(draw)))
    for tool, kind in ARGUMENTS.items():
        ask(f"tool {tool} ({kind})", lambda draw, tool=tool: tool_conversation(draw, tool))
    ask("no tool", lambda draw: Conversation(call(draw, draw.choice(list(TOOLS)), ())))
    ask("refusal", lambda draw: Conversation(small_talk(draw)))
    ask("image", lambda draw: Conversation(image(draw)))
    ask("image, in capitals", lambda draw: Conversation(image(draw)), "capitals")
    ask("image, in one word", lambda draw: Conversation(image(draw)), "word")
    ask("sum, in one word", lambda draw: Conversation(addition(draw)), "word")
    ask("refusal, in capitals", lambda draw: Conversation(small_talk(draw)), "capitals")
    ask("after other turns", several_turns)
    return asked


def several_turns(draw: Draw) -> Conversation:
    """Five turns of different tasks in one conversation."""
    tasks = [addition, image, small_talk, recall, speaker, image, addition]
    draw.limit = 600
    return Conversation([message for task in draw.sample(tasks, 5) for message in task(draw)])


def majority(asked: list[Item]) -> float:
    """The share of the most frequent answer."""
    counts = Counter(repr((text_of(item.answer), calls_of(item.answer))) for item in asked)
    return counts.most_common(1)[0][1] / len(asked)


def last_seen(name: str, item: Item) -> str:
    """The answer of a program that copies the last thing of the right kind before the question."""
    passage, _, _ = text_of(item.messages[0]).rpartition("\n\n")
    if name == "speaker":
        heads = [block.split("\n")[0] for block in passage.split("\n\n")]
        return heads[-1]
    lines = passage.split("\n")
    if name == "recall":
        lines = [line for line in lines if line.startswith("The key of")]
    return lines[-1].rstrip()


def task_results(model: Any, tokenizer: Tokenizer, plays: Plays, count: int) -> dict[str, Any]:
    """The share of right answers for each task, with baselines."""
    table: dict[str, Any] = {}
    for name, asked in questions(plays, count).items():
        if model.config.model_type != "mistral3" and name != "recall":
            continue
        given = answers(model, tokenizer, asked)
        right = [is_right(answer, item) for answer, item in zip(given, asked)]
        row: dict[str, Any] = {"right": sum(right) / count, "majority": majority(asked)}
        if name in ("speaker", "next line", "recall"):
            row["last"] = sum(last_seen(name, item) == text_of(item.answer) for item in asked) / count
        wanted = [place for place, item in enumerate(asked) if calls_of(item.answer)]
        if wanted:
            row["parsed"] = sum(len(calls_of(given[place])) == 1 for place in wanted) / len(wanted)
            row["calls"] = sum(right[place] for place in wanted) / len(wanted)
        wrong = [place for place in range(count) if not right[place]][:3]
        row["mistakes"] = [[text_of(given[place]), calls_of(given[place]), text_of(asked[place].answer)] for place in wrong]
        table[name] = row
        print(f"{name:<30}" + "".join(f"{key} {value:.3f}  " for key, value in row.items() if key != "mistakes"), flush=True)
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


def hidden_keys(plays: Plays, tokens: int, count: int) -> list[Item]:
    """Questions for the first of two keys in texts of about so many tokens."""
    draw = Draw(f"test recall {tokens}", plays, test=True)
    size = int((tokens - 60) * 2.7)
    return [next(items(Conversation(recall(draw, size, keys=1)))) for _ in range(count)]


def context_curve(model: Any, tokenizer: Tokenizer, plays: Plays, count: int, lengths: list[int]) -> dict[str, Any]:
    """Recall, and bits per byte of a play, against the context."""
    rows: dict[str, Any] = {"context": lengths, "recall": [], "bits_per_byte": []}
    for length in lengths:
        rows["recall"].append(share(model, tokenizer, hidden_keys(plays, length, count)))
        text = plays.texts[0][:60000]
        rows["bits_per_byte"].append(bits_per_byte(model, tokenizer, [text], length))
    return rows


def distance_curve(model: Any, tokenizer: Tokenizer, plays: Plays, count: int, window: int) -> dict[str, Any]:
    """Recall of a key that stands so many windows before the question."""
    rows: dict[str, Any] = {"windows": [0.5, 1, 2, 3, 4, 5, 6, 8, 10, 12], "recall": []}
    for windows in rows["windows"]:
        draw = Draw(f"test distance {windows}", plays, test=True)
        asked: list[Item] = []
        while len(asked) < count:
            size = int((windows * window + 30) * 2.85)
            item = next(items(Conversation(recall(draw, size, keys=1, place=0.02))))
            name = text_of(item.answer).split(" is ")[0]
            text = text_of(item.messages[0])
            distance = len(tokenizer.encode(text[text.index(name) :], bos=False))
            if abs(distance - windows * window) < window / 2:
                asked.append(item)
        rows["recall"].append(share(model, tokenizer, asked))
    return rows


VARIANTS: dict[str, dict[str, Any]] = {
    "as trained": {},
    "factor 4": {"factor": 4.0},
    "factor 1": {"rope_type": "default"},
    "without the query scale": {"llama_4_scaling_beta": 0.0},
    "magnitude 1.277": {"attention_factor": 1.2772588722239782, "mscale": None, "mscale_all_dim": None},
}
BEFORE_EXTENSION: dict[str, dict[str, Any]] = {
    "factor 1": {},
    "factor 4": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    "factor 16": {"rope_type": "yarn", "factor": 16.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    "factor 16, magnitude 1.277": {"rope_type": "yarn", "factor": 16.0},
}


def report(directory: Path, device: torch.device, count: int, path: Path) -> None:
    """Print tables of a model's results, and write them as JSON.

    Args:
        count: questions of each task.
        path: the file that is written, after each part.
    """
    started = time.monotonic()
    model, tokenizer = load_model(directory, torch.float32, device), Tokenizer.from_dir(directory)
    texts = corpus.load()
    plays = Plays.of(texts["test"], texts["train"])
    results: dict[str, Any] = {"model": str(directory), "count": count, "bits_per_byte": {}}
    text = model.config.get_text_config()
    train_text = "".join(texts["train"])
    window = min(1024, text.max_position_embeddings)
    scores: dict[str, Callable[[str], float]] = {
        "xz -9e, given the training text": lambda part: xz_bits_per_byte(train_text, "".join(texts[part])),
        "Witten-Bell 5-gram": lambda part: ngram_bits_per_byte(train_text, "".join(texts[part])),
        str(directory): lambda part: bits_per_byte(model, tokenizer, texts[part], window),
    }
    for name, score in scores.items():
        row = {part: score(part) for part in ("validation", "test")}
        print(f"{name:<44} bits per byte: The Tempest {row['validation']:.3f}, Hamlet and Twelfth Night {row['test']:.3f}")
        results["bits_per_byte"][name] = row

    def keep(name: str, content: Any) -> None:
        results[name] = content
        results["seconds"] = round(time.monotonic() - started)
        write_json(path, results)
        print(f"({results['seconds']} s)", flush=True)

    keep("tasks", task_results(model, tokenizer, plays, count))
    if model.config.model_type != "mistral3":
        curve = distance_curve(model, tokenizer, plays, count, text.sliding_window)
        print("recall by distance in windows", curve)
        keep("distance", curve)
        return
    context = text.rope_parameters["original_max_position_embeddings"]
    lengths = [context * 2**power for power in range(5)]
    results["context"] = {}
    for name, rope in VARIANTS.items():
        curve = context_curve(changed(model, **rope), tokenizer, plays, max(count // 2, 2), lengths)
        print(f"{name:<30}", curve, flush=True)
        keep("context", results["context"] | {name: curve})
    if not (directory / "after_text").is_dir():
        return
    model = load_model(directory / "after_text", torch.float32, device)
    results["after_text"] = {}
    for name, rope in BEFORE_EXTENSION.items():
        curve = context_curve(changed(model, **rope), tokenizer, plays, max(count // 2, 2), lengths)
        print(f"after the first stage, {name:<30}", curve, flush=True)
        keep("after_text", results["after_text"] | {name: curve})

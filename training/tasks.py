"""Tasks that a program makes and checks: questions, each with its one right answer.

A task is a function of a `Draw`. It returns messages as `Tokenizer.encode_chat` takes them. `conversation` joins
several tasks. A tenth of all keys, names, words, images, and pairs of numbers or cities is the test's (`Draw.fresh`),
and the scenes of the test come from other plays. Both parts have the same greetings, and the same questions for the
tools weather and timer.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from training.shapes import COLOURS, KINDS, PLACES, Shape, draw_shapes, paint

Messages = list[dict[str, Any]]
Speech = tuple[str, list[str]]  # a speaker's name, and the lines
SPEECH = re.compile(r"([A-Z][A-Z .']+|[A-Z][a-z]{1,6})\.\n([^\[\]]+)")
NUMBERS = ("no", "one", "two", "three")
# Cities, tools, open questions, and the system prompts that ask for a style.
WORDS = json.loads(Path(__file__).with_name("words.json").read_text())
STYLES, TOOLS, CITIES = WORDS["styles"], WORDS["tools"], WORDS["cities"]
ABILITIES = "Shakespeare, sums, tools and shapes"
REFUSAL = f"I only know {ABILITIES}."


class Plays(NamedTuple):
    """What the tasks need of some plays."""

    texts: list[str]
    scenes: list[list[Speech]]  # runs of speeches without a stage direction
    names: list[str]  # of speakers
    words: list[str]

    @classmethod
    def of(cls, texts: Sequence[str], others: Sequence[str] = ()) -> Plays:
        """Read the plays of a part. Names and words are also those of the other plays: `Draw.fresh` divides them."""
        scenes: list[list[Speech]] = []
        for text in texts:
            scenes.append([])
            for block in text.split("\n\n"):
                speech = SPEECH.fullmatch(block.strip())
                if speech is None:
                    scenes.append([])
                else:
                    scenes[-1].append((speech[1], speech[2].strip().split("\n")))
        everything = "\n".join((*texts, *others))
        speakers = re.findall(r"^([A-Z]{4,})\.$", everything, re.MULTILINE)
        names = sorted({name.title() for name in speakers})
        words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", everything)))
        return cls(list(texts), [scene for scene in scenes if len(scene) >= 4], names, words)


class Draw(random.Random):
    """A random generator that knows what it draws for.

    Attributes:
        plays: the plays of the part.
        test: whether the questions are for the test.
        limit: characters of a passage at most.
        style: the answers are "plain", in "capitals" or in one "word".
    """

    def __init__(self, seed: str, plays: Plays, test: bool = False, limit: float = 2000, style: str = "plain") -> None:
        super().__init__(seed)
        self.plays, self.test, self.limit, self.style = plays, test, limit, style

    def fresh(self, make: Callable[[], Any]) -> Any:
        """A value of `make` that belongs to this part. One in ten is the test's, by its checksum."""
        while True:
            value = make()
            if (zlib.crc32(repr(value).encode()) % 10 == 0) == self.test:
                return value

    def say(self, plain: str, word: str) -> str:
        """The answer in the style that the system prompt asks for."""
        if self.style == "word":
            return word
        if self.style == "capitals":
            return plain.upper()
        return plain

    def name(self) -> str:
        """The name of a speaker."""
        return str(self.fresh(lambda: self.choice(self.plays.names)))

    def city(self) -> str:
        """A city of the list."""
        return str(self.choice(CITIES))

    def number(self) -> str:
        """A number of one to four digits."""
        return str(self.randrange(10 ** self.randint(1, 4)))

    def free_word(self) -> str:
        """A word of the plays, or one that does not exist."""
        if self.random() < 0.5:
            return str(self.choice(self.plays.words))
        syllables = [self.choice("bcdfghklmnprstvwz") + self.choice("aeiou") for _ in range(self.randint(2, 4))]
        return "".join(syllables) + self.choice(("", "n", "r", "s", "t", "l"))


def turn(question: Any, answer: Any) -> Messages:
    """A question of the user and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def thought(thinking: str, answer: str) -> list[dict[str, Any]]:
    """The content of an answer after thinking."""
    return [{"type": "thinking", "thinking": thinking, "closed": True}, {"type": "text", "text": answer}]


# ------------------------------------------------------------------------------------------------- Shakespeare


def scene(draw: Draw) -> list[Speech]:
    """Three to nine consecutive speeches of at least two speakers. Together they have fewer characters than a limit,
    which is drawn from 100 to 450."""
    while True:
        limit = draw.randint(100, 450)
        speeches = draw.choice(draw.plays.scenes)
        start = draw.randrange(len(speeches) - 2)
        chosen: list[Speech] = []
        size = 0
        for speaker, lines in speeches[start : start + draw.randint(3, 9)]:
            size += len(speaker) + sum(map(len, lines))
            if size > limit:
                break
            chosen.append((speaker, lines))
        if len(chosen) >= 3 and len({speaker for speaker, _ in chosen}) >= 2:
            return chosen


def written(speeches: list[Speech]) -> str:
    """Speeches as they are in the plays."""
    return "\n\n".join("\n".join((f"{speaker}.", *lines)) for speaker, lines in speeches)


def unique_lines(speeches: list[Speech]) -> list[tuple[str, str, str | None]]:
    """The lines that occur once in a scene: the speaker, the line, and the next line of the same speech."""
    found = []
    text = written(speeches)
    for speaker, lines in speeches:
        for line, following in zip(lines, [*lines[1:], None]):
            if len(line) >= 12 and '"' not in line and text.count(line) == 1:
                found.append((speaker, line, following))
    return found


def who_speaks(draw: Draw) -> Messages:
    """The speakers of one or two lines of the scene that is shown. The speaker is drawn first and then the line, so
    that each speaker is the answer equally often.

    Thinking copies the scene up to the line, and the answer is the last name in the copy. Without thinking, a model of
    this size chooses among the names at random."""
    lines: dict[str, list[str]] = {}  # of each speaker
    while len(lines) < 2:
        speeches = scene(draw)
        lines = {}
        for speaker, line, _ in unique_lines(speeches):
            lines.setdefault(speaker, []).append(line)
    text = written(speeches)
    messages: Messages = []
    for _ in range(draw.randint(1, 2)):
        speaker = draw.choice(sorted(lines))
        line = draw.choice(lines[speaker])
        copied = text[: text.index(line) + len(line)]
        messages += turn(f'Who says "{line}"?', thought(copied, f"{speaker}."))
    messages[0]["content"] = f"{text}\n\n{messages[0]['content']}"
    return messages


def next_line(draw: Draw) -> Messages:
    """The line that follows a line of the scene that is shown."""
    pairs: list[tuple[str, str]] = []
    while not pairs:
        speeches = scene(draw)
        pairs = [(line, following) for _, line, following in unique_lines(speeches) if following]
    line, following = draw.choice(pairs)
    return turn(f'{written(speeches)}\n\nWhich line follows "{line}"?', following.rstrip())


def recall(draw: Draw, size: int | None = None, keys: int | None = None, place: float | None = None) -> Messages:
    """Keys that are hidden in a passage, and a question for each but one.

    Args:
        size: the characters of the passage; None: drawn.
        keys: how many questions there are; None: drawn.
        place: where in the passage the first key stands, from 0 to 1; None: drawn.
    """
    if size is None:
        size = int(draw.limit * draw.random())
    if keys is None:
        keys = draw.randint(1, 4)
    play = draw.choice([text for text in draw.plays.texts if len(text) > size + 1000])
    start = draw.randrange(len(play) - size)
    lines = play[start : start + size].split("\n")[1:]
    secrets: dict[str, str] = {}
    while len(secrets) <= keys:
        secrets[draw.name()] = draw.fresh(lambda: str(draw.randint(1000, 9999)))
    places = [int(draw.random() * (len(lines) + 1)) for _ in secrets]
    if place is not None:
        places[0] = int(place * len(lines))
    sentences = [f"The key of {name} is {secret}." for name, secret in secrets.items()]
    for where, sentence in sorted(zip(places, sentences), reverse=True):
        lines.insert(where, sentence)
    messages: Messages = []
    for (name, secret), sentence in list(zip(secrets.items(), sentences))[:keys]:
        messages += turn(f"What is the key of {name}?", draw.say(sentence, secret))
    messages[0]["content"] = "\n".join(lines) + "\n\n" + messages[0]["content"]
    return messages


def repeat(draw: Draw) -> Messages:
    """Words, names and numbers, or a line of a play, to be said again. This teaches to copy, which other tasks need."""
    if draw.random() < 0.3:
        _, lines = draw.choice(draw.choice(draw.plays.scenes))
        text = draw.choice(lines).strip()
    else:
        kinds = (draw.free_word, draw.name, draw.city, draw.number)
        text = " ".join(draw.choice(kinds)() for _ in range(draw.randint(2, 10)))
    return turn(f"Repeat: {text}", text)


# ----------------------------------------------------------------------------------------- thinking and tools


def addition(draw: Draw) -> Messages:
    """A sum of two numbers of up to three digits. Thinking adds digit + digit + carry from the right."""
    a, b = draw.fresh(lambda: tuple(draw.randrange(10 ** draw.randint(1, 3)) for _ in range(2)))
    steps = []
    carry = 0
    for place in range(max(len(str(a)), len(str(b)))):
        first, second = a // 10**place % 10, b // 10**place % 10
        total = first + second + carry
        steps.append(f"{first}+{second}+{carry}={total:02}")
        carry = total // 10
    question = draw.choice(("What is {} + {}?", "What is {} plus {}?", "Add {} and {}.", "{} + {}?"))
    answer = draw.say(f"{a} + {b} = {a + b}.", str(a + b))
    return turn(question.format(a, b), thought(" ".join(steps), answer))


def schema(name: str) -> dict[str, Any]:
    """A tool as it is given to a model."""
    tool = TOOLS[name]
    properties = {argument: {"type": kind} for argument, kind in tool["types"].items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": name, "description": tool["description"], "parameters": parameters}
    return {"type": "function", "function": function}


def arguments_and_result(draw: Draw, name: str) -> tuple[dict[str, Any], str]:
    """The arguments of a call, and the result of the tool."""
    if name == "weather":
        weather = draw.choice(WORDS["weather"])
        return {"city": draw.city()}, f"{weather}, {draw.randint(-9, 35)} degrees"
    if name == "multiply":
        a, b = draw.fresh(lambda: (draw.randint(2, 999), draw.randint(2, 999)))
        return {"a": a, "b": b}, str(a * b)
    if name == "distance":
        start, goal = draw.fresh(lambda: tuple(draw.sample(CITIES, 2)))
        return {"start": start, "goal": goal}, f"{draw.randint(50, 9000)} km"
    if name == "timer":
        return {"minutes": draw.randint(1, 600)}, "ok"
    return {"word": draw.fresh(draw.free_word)}, draw.free_word()


def call(draw: Draw, name: str, present: Sequence[str]) -> Messages:
    """A question that needs a tool: its call, its result and the answer. Without the tool, a refusal."""
    arguments, result = arguments_and_result(draw, name)
    question = draw.choice(TOOLS[name]["questions"]).format(**arguments)
    if name not in present:
        return turn(question, "I have no tool for that.")
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    ask, answer = turn(question, TOOLS[name]["answer"].format(**arguments, result=result))
    called = {"role": "assistant", "content": "", "tool_calls": calls}
    return [ask, called, {"role": "tool", "content": result}, answer]


def small_talk(draw: Draw) -> Messages:
    """A greeting, or a question that the model cannot answer and says so."""
    if draw.random() < 0.15:
        question = draw.choice(("Hello", "Hello!", "Hi", "Good day.", "Who are you?", "What can you do?"))
        return turn(question, draw.say(f"Hello! I know {ABILITIES}.", "Hello"))
    question = draw.fresh(lambda: draw.choice(WORDS["open_questions"]).format(draw.choice(WORDS["subjects"])))
    return turn(question, draw.say(REFUSAL, "No"))


# ------------------------------------------------------------------------------------------------------ images


def caption(shapes: list[Shape]) -> str:
    """All shapes of an image in words."""
    parts = [f"a {shape.name} at the {PLACES[shape.place]}" for shape in shapes]
    if len(parts) > 1:
        parts[-2:] = [f"{parts[-2]} and {parts[-1]}"]
    return ", ".join(parts)


def ask(draw: Draw, shapes: list[Shape], where: str = "") -> tuple[str, str]:
    """A question about an image, and its answer. `where` ends the question: " in the first image"."""
    kinds = ["count", "count all", "what", "colour", "where", "caption"]
    if draw.style == "word":
        kinds = kinds[:4]
    kind = draw.choice(kinds)
    shape = draw.choice(shapes)
    if kind == "colour" and sum(other.kind == shape.kind for other in shapes) == 1:
        answer = draw.say(f"The {shape.kind} is {shape.colour}.", shape.colour)
        return f"What colour is the {shape.kind}{where}?", answer
    if kind == "where" and sum(other.name == shape.name for other in shapes) == 1:
        return f"Where is the {shape.name}{where}?", draw.say(f"It is at the {PLACES[shape.place]}.", "")
    if kind == "what":
        place = draw.randrange(4)
        answer = draw.say("Nothing.", "nothing")
        for shape in shapes:
            if shape.place == place:
                answer = draw.say(f"A {shape.name}.", shape.kind)
        return f"What is at the {PLACES[place]}{where}?", answer
    if kind == "caption":
        text = caption(shapes)
        return f"What do you see{where}?", draw.say(f"{text[0].upper()}{text[1:]}.", "")
    return count(draw, shapes, where, everything=kind != "count")


def count(draw: Draw, shapes: list[Shape], where: str, everything: bool) -> tuple[str, str]:
    """A question for the number of all shapes, or of those of a kind or a colour, and its answer."""
    noun = "shape"
    number = len(shapes)
    if not everything:
        noun = draw.choice((*KINDS, *(f"{colour} shape" for colour in COLOURS)))
        number = sum(noun in (shape.kind, f"{shape.colour} shape") for shape in shapes)
    sentence = f"There are {NUMBERS[number]} {noun}s."
    if number == 1:
        sentence = f"There is one {noun}."
    return f"How many {noun}s are there{where}?", draw.say(sentence, NUMBERS[number])


def image(draw: Draw) -> Messages:
    """One image or two, and one to three questions about them."""
    images = [draw.fresh(lambda: draw_shapes(draw)) for _ in range(draw.choice((1, 1, 1, 2)))]
    messages: Messages = []
    for _ in range(draw.randint(1, 3)):
        which = draw.randrange(len(images))
        where = ""
        if len(images) == 2:
            where = f" in the {('first', 'second')[which]} image"
        messages += turn(*ask(draw, images[which], where))
    parts = [{"type": "image", "image": paint(shapes, draw)} for shapes in images]
    messages[0]["content"] = [*parts, {"type": "text", "text": messages[0]["content"]}]
    return messages


# ----------------------------------------------------------------------------------------------- conversations


class Conversation(NamedTuple):
    """Messages, and the tools that they may use."""

    messages: Messages
    tools: list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        """All words, from which the vocabulary is learned."""
        pieces = [json.dumps(self.tools)]
        for message in self.messages:
            content = message["content"]
            if isinstance(content, str):
                content = [{"text": content}]
            pieces += [part.get("text", part.get("thinking", "")) for part in content]
            pieces += [json.dumps(call["function"]["arguments"]) for call in message.get("tool_calls", ())]
        return "\n".join(pieces)


# The length of text, in characters, that has about as many tokens as a tool's schema, as the special tokens around a
# message, and as an image.
SCHEMA, FRAME, IMAGE = 200, 60, 60
TASKS: dict[str, Callable[[Draw], Messages]] = {
    "speaker": who_speaks, "next line": next_line, "recall": recall, "repeat": repeat, "sum": addition,
    "refusal": small_talk, "image": image,
}  # fmt: skip
# The tasks whose answers can be in a style.
STYLED = {"capitals": ("sum", "refusal", "image"), "word": ("sum", "refusal", "image", "recall", "speaker")}


def conversation(draw: Draw, shares: dict[str, float], size: int) -> Conversation:
    """Questions and answers of several tasks, until they have about `size` characters.

    Args:
        shares: how often each task is drawn: names of TASKS, and "tool".
    """
    messages: Messages = []
    draw.style = "plain"
    if "refusal" in shares:
        draw.style = draw.choices(("plain", *STYLES), (0.7, 0.15, 0.15))[0]
    if draw.style != "plain":
        messages.append({"role": "system", "content": draw.choice(STYLES[draw.style])})
        shares = {name: share for name, share in shares.items() if name in STYLED[draw.style]}
    present: list[str] = []
    if "tool" in shares and draw.random() < 0.6:
        present = draw.sample(list(TOOLS), draw.randint(1, min(4, 1 + size // 400)))  # more in longer conversations
    remaining = size - SCHEMA * len(present)
    while remaining > 0 or len(messages) < 2:
        name = draw.choices(list(shares), list(shares.values()))[0]
        if name == "tool":
            candidates = present
            if not present or draw.random() >= 0.9:
                candidates = [tool for tool in TOOLS if tool not in present]
            new = call(draw, draw.choice(candidates), present)
        else:
            new = TASKS[name](draw)
        messages += new
        remaining -= sum(FRAME + length(message) for message in new)
    tools = None
    if present:
        tools = [schema(name) for name in present]
    return Conversation(messages, tools)


def length(message: dict[str, Any]) -> int:
    """About how many characters the content of a message takes; an image counts as IMAGE."""
    content = message["content"]
    if isinstance(content, str):
        return len(content)
    return sum(len(part.get("text", part.get("thinking", " " * IMAGE))) for part in content)

"""Tasks that a program makes and checks: turns of a conversation, each with the one right answer.

A task is a function of a `Draw`; it returns messages as `Tokenizer.encode_chat` takes them. `conversation` joins turns of
several tasks. Training and test never share what a turn is about: `Draw.fresh` keeps a tenth of all keys, names, words,
numbers and images for the test, and the lines come from other plays.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from training.shapes import COLOURS, KINDS, PLACES, Shape, draw_shapes, paint

Messages = list[dict[str, Any]]
Speech = tuple[str, list[str]]  # a speaker's name, and the lines
SPEECH = re.compile(r"([A-Z][A-Z .']+|[A-Z][a-z]{1,6})\.\n([^\[\]]+)")
NUMBERS = ("no", "one", "two", "three")
CITIES = (
    "Amsterdam Athens Baghdad Bangkok Barcelona Beijing Belgrade Berlin Bern Bogota Bombay Boston Bristol Brussels "
    "Budapest Cairo Calais Chicago Cologne Cork Cracow Dakar Dallas Damascus Delhi Denver Dover Dresden Dublin "
    "Edinburgh Florence Geneva Genoa Ghent Glasgow Graz Hamburg Hanoi Havana Helsinki Houston Istanbul Jakarta "
    "Jerusalem Kabul Kyoto Lagos Leeds Leipzig Lima Lisbon London Lyon Madrid Manila Marseille Messina Miami Milan "
    "Montreal Moscow Munich Nairobi Nantes Naples Nice Osaka Oslo Oxford Padua Palermo Paris Perth Pisa Porto Prague "
    "Quebec Quito Reykjavik Riga Rome Rotterdam Salzburg Santiago Seoul Seville Shanghai Sofia Stockholm Sydney Tokyo "
    "Toronto Toulouse Tripoli Tunis Turin Utrecht Valencia Venice Verona Vienna Warsaw York Zagreb Zurich"
).split()
WEATHER = ("rain", "sun", "snow", "wind", "fog", "clouds", "storm", "hail")
ABILITIES = "Shakespeare, sums, tools and shapes"
REFUSAL = f"I only know {ABILITIES}."
HELLO = f"Hello! I know {ABILITIES}."
NO_TOOL = "I have no tool for that."
STYLES: dict[str, tuple[str, ...]] = {
    "capitals": ("Answer in capitals.", "Write your answers in capital letters.", "Use capital letters only."),
    "word": ("Answer in one word.", "Answer with one word.", "Give one word as the answer."),
}
SUBJECTS = (
    "France|Peru|the moon|my cat|a car|the sea|football|chess|love|money|jazz|a dragon|the sun|Mars|bread|tea|history|"
    "physics|a computer|winter|dogs|birds|cooking|the news|a river|gold|the king of Spain|music|my mother|holidays"
).split("|")
OPEN_QUESTIONS = (
    "What is the capital of {}?|Tell me a joke about {}.|Write a poem about {}.|Who invented {}?|What do you think of {}?|"
    "How old is {}?|Can you explain {}?|Why do people like {}?|Tell me about {}.|Give me advice on {}.|Is {} good for me?|"
    "What happened to {} last year?|Translate {} into German.|Write a program about {}.|Where can I buy {}?|"
    "Do you like {}?|How much does {} cost?|What is the history of {}?|Who is the best at {}?|How do I learn about {}?"
).split("|")


class Draw(random.Random):
    """A random generator that knows for which part it draws, and how.

    Attributes:
        plays: those of the part.
        test: whether the turns are for the test.
        limit: characters of a passage at most.
        style: the answers are "plain", in "capitals" or in one "word".
    """

    def __init__(self, seed: str, plays: Plays, test: bool = False, limit: float = 2000) -> None:
        super().__init__(seed)
        self.plays, self.test, self.limit, self.style = plays, test, limit, "plain"

    def fresh(self, make: Callable[[], Any]) -> Any:
        """A value of `make` that belongs to this part: one in ten is the test's, by its checksum."""
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


class Plays(NamedTuple):
    """What the tasks need of some plays."""

    texts: list[str]
    scenes: list[list[Speech]]
    names: list[str]  # of speakers, in all plays
    words: list[str]  # in all plays

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
                    continue
                scenes[-1].append((speech[1], speech[2].strip().split("\n")))
        everything = "\n".join((*texts, *others))
        speakers = re.findall(r"^([A-Z]{4,})\.$", everything, re.MULTILINE)
        names = sorted({name.title() for name in speakers})
        words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", everything)))
        return cls(list(texts), [scene for scene in scenes if len(scene) >= 4], names, words)


def turn(question: Any, answer: Any) -> Messages:
    """A question of the user and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# ------------------------------------------------------------------------------------------------- Shakespeare


def scene(draw: Draw) -> list[Speech]:
    """Three to nine speeches in a row, of at least two speakers, with 700 characters together at most."""
    while True:
        speeches = draw.choice(draw.plays.scenes)
        start = draw.randrange(len(speeches) - 2)
        chosen: list[Speech] = []
        size = 0
        for speaker, lines in speeches[start : start + draw.randint(3, 9)]:
            size += len(speaker) + sum(map(len, lines))
            if size > 700:
                break
            chosen.append((speaker, lines))
        if len(chosen) >= 3 and len({speaker for speaker, _ in chosen}) >= 2:
            return chosen


def written(speeches: list[Speech]) -> str:
    """Speeches as they are in the plays."""
    return "\n\n".join("\n".join((f"{speaker}.", *lines)) for speaker, lines in speeches)


def unique_lines(speeches: list[Speech]) -> list[tuple[str, str, str | None]]:
    """The lines that are found once in a scene: the speaker, the line, and the next line of the same speech."""
    found = []
    text = written(speeches)
    for speaker, lines in speeches:
        for line, following in zip(lines, [*lines[1:], None]):
            if len(line) >= 12 and '"' not in line and text.count(line) == 1:
                found.append((speaker, line, following))
    return found


def speaker(draw: Draw) -> Messages:
    """Who says a line of the scene that is shown, one to three times."""
    while True:
        speeches = scene(draw)
        lines = unique_lines(speeches)
        if lines:
            break
    messages: Messages = []
    for name, line, _ in draw.sample(lines, min(draw.randint(1, 3), len(lines))):
        messages += turn(f'Who says "{line}"?', f"{name}.")
    messages[0]["content"] = f"{written(speeches)}\n\n{messages[0]['content']}"
    return messages


def next_line(draw: Draw) -> Messages:
    """The line that follows a line of the scene that is shown."""
    while True:
        speeches = scene(draw)
        pairs = [(line, following) for _, line, following in unique_lines(speeches) if following]
        if pairs:
            break
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
        size = int(draw.limit * draw.random() ** 2)  # short ones teach more in the same time
    if keys is None:
        keys = draw.randint(1, 4)
    play = draw.choice([text for text in draw.plays.texts if len(text) > size + 1000])
    start = draw.randrange(len(play) - size)
    lines = play[start : start + size].split("\n")[1:] or [""]
    names: list[str] = []
    while len(names) <= keys:
        name = draw.fresh(lambda: draw.choice(draw.plays.names))
        if name not in names:
            names.append(name)
    secrets = {name: draw.fresh(lambda: str(draw.randint(1000, 9999))) for name in names}
    places = [int(draw.random() * len(lines)) for _ in names]
    if place is not None:
        places[0] = int(place * len(lines))
    for name, where in sorted(zip(names, places), key=lambda pair: -pair[1]):
        lines.insert(where, f"The key of {name} is {secrets[name]}.")
    questions = [f"What is the key of {name}?" for name in names[:keys]]
    questions[0] = "\n".join(lines) + "\n\n" + questions[0]
    messages: Messages = []
    for name, question in zip(names, questions):
        messages += turn(question, draw.say(f"The key of {name} is {secrets[name]}.", secrets[name]))
    return messages


def repeat(draw: Draw) -> Messages:
    """Words, names and numbers, or a line of a play, to be said again. It teaches to copy, which other tasks need."""
    kinds = (
        lambda: free_word(draw), lambda: draw.choice(CITIES), lambda: draw.choice(draw.plays.names),
        lambda: str(draw.randrange(10 ** draw.randint(1, 4))),
    )  # fmt: skip
    text = " ".join(draw.choice(kinds)() for _ in range(draw.randint(2, 10)))
    if draw.random() < 0.3:
        _, lines = draw.choice(draw.choice(draw.plays.scenes))
        text = draw.choice(lines).strip()
    return turn(f"Repeat: {text}", text)


# ----------------------------------------------------------------------------------------- thinking and tools


def addition(draw: Draw) -> Messages:
    """A sum of two numbers of up to three digits, worked digit by digit in thinking: digit + digit + carry = carry and
    digit, from the right."""
    a, b = draw.fresh(lambda: (draw.randrange(10 ** draw.randint(1, 3)), draw.randrange(10 ** draw.randint(1, 3))))
    steps = []
    carry = 0
    for place in range(max(len(str(a)), len(str(b)))):
        first, second = a // 10**place % 10, b // 10**place % 10
        total = first + second + carry
        steps.append(f"{first}+{second}+{carry}={total:02}")
        carry = total // 10
    thinking = {"type": "thinking", "thinking": " ".join(steps), "closed": True}
    answer = {"type": "text", "text": draw.say(f"{a} + {b} = {a + b}.", str(a + b))}
    question = draw.choice(("What is {} + {}?", "What is {} plus {}?", "Add {} and {}.", "{} + {}?"))
    return turn(question.format(a, b), [thinking, answer])


class Tool(NamedTuple):
    """A tool: its description, the JSON type of each argument, the questions that need it, and the answer."""

    description: str
    types: dict[str, str]
    questions: tuple[str, ...]
    answer: str


TOOLS = {
    "weather": Tool(
        "The weather in a city.", {"city": "string"},
        ("What is the weather in {city}?", "How is the weather in {city} today?", "Will it rain in {city}?"),
        "In {city}: {result}.",
    ),
    "multiply": Tool(
        "Multiply two numbers.", {"a": "integer", "b": "integer"},
        ("What is {a} times {b}?", "Multiply {a} by {b}.", "{a} times {b}?"),
        "{a} times {b} is {result}.",
    ),
    "distance": Tool(
        "The distance between two cities.", {"start": "string", "goal": "string"},
        ("How far is it from {start} to {goal}?", "What is the distance from {start} to {goal}?"),
        "From {start} to {goal} it is {result}.",
    ),
    "timer": Tool(
        "Set a timer.", {"minutes": "integer"},
        ("Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes."),
        "The timer is set to {minutes} minutes.",
    ),
    "define": Tool(
        "The meaning of a word.", {"word": "string"},
        ("What does {word} mean?", "Explain the word {word}.", "Look up {word}."),
        "{word} means {result}.",
    ),
}  # fmt: skip


def free_word(draw: Draw) -> str:
    """A word of the plays, or one that is no word."""
    if draw.random() < 0.5:
        return str(draw.choice(draw.plays.words))
    syllables = (draw.choice("bcdfghklmnprstvwz") + draw.choice("aeiou") for _ in range(draw.randint(2, 4)))
    return "".join(syllables) + draw.choice(("", "n", "r", "s", "t", "l"))


def arguments_and_result(draw: Draw, name: str) -> tuple[dict[str, Any], str]:
    """The arguments of a call, and the result of the tool."""
    if name == "weather":
        city = draw.choice(CITIES)
        return {"city": city}, f"{draw.choice(WEATHER)}, {draw.randint(-9, 35)} degrees"
    if name == "multiply":
        a, b = draw.fresh(lambda: (draw.randint(2, 999), draw.randint(2, 999)))
        return {"a": a, "b": b}, str(a * b)
    if name == "distance":
        start, goal = draw.fresh(lambda: tuple(draw.sample(CITIES, 2)))
        return {"start": start, "goal": goal}, f"{draw.randint(50, 9000)} km"
    if name == "timer":
        return {"minutes": draw.randint(1, 600)}, "ok"
    return {"word": draw.fresh(lambda: free_word(draw))}, free_word(draw)


def call(draw: Draw, name: str, present: Sequence[str]) -> Messages:
    """A question that needs a tool: its call, its result and the answer. Without the tool, a refusal."""
    arguments, result = arguments_and_result(draw, name)
    tool = TOOLS[name]
    question = draw.choice(tool.questions).format(**arguments)
    if name not in present:
        return turn(question, NO_TOOL)
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    answer = tool.answer.format(**arguments, result=result)
    messages = turn(question, answer)
    messages[1:1] = [
        {"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": result},
    ]  # fmt: skip
    return messages


def schema(name: str) -> dict[str, Any]:
    """A tool as it is given to a model."""
    tool = TOOLS[name]
    properties = {argument: {"type": kind} for argument, kind in tool.types.items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def small_talk(draw: Draw) -> Messages:
    """A greeting, or a question that the model cannot answer and says so."""
    if draw.random() < 0.15:
        question = draw.choice(("Hello", "Hello!", "Hi", "Good day.", "Who are you?", "What can you do?"))
        return turn(question, draw.say(HELLO, "Hello"))
    question = draw.fresh(lambda: draw.choice(OPEN_QUESTIONS).format(draw.choice(SUBJECTS)))
    return turn(question, draw.say(REFUSAL, "No"))


# ------------------------------------------------------------------------------------------------------ images


def named(shape: Shape) -> str:
    """A shape in words."""
    return f"{shape.colour} {shape.kind}"


def image_part(shapes: list[Shape], draw: Draw) -> dict[str, Any]:
    """The part of a message that holds the image of shapes."""
    return {"type": "image", "image": paint(shapes, draw)}


def caption(shapes: list[Shape]) -> str:
    """All shapes of an image in words."""
    parts = [f"a {named(shape)} at the {PLACES[shape.place]}" for shape in shapes]
    if len(parts) > 1:
        parts[-2:] = [f"{parts[-2]} and {parts[-1]}"]
    return ", ".join(parts)


def ask(draw: Draw, shapes: list[Shape], where: str = "") -> tuple[str, Any]:
    """A question about an image, and its answer. `where` ends the question: " in the first image".

    Questions for a number or a place are answered after a look at the whole image, in thinking.
    """
    kinds = ["count", "all", "what", "colour", "where", "caption"]
    if draw.style == "word":
        kinds = kinds[:4]
    kind = draw.choice(kinds)
    shape = draw.choice(shapes)
    look = caption(shapes)
    if kind == "colour" and sum(other.kind == shape.kind for other in shapes) == 1:
        return f"What colour is the {shape.kind}{where}?", draw.say(f"The {shape.kind} is {shape.colour}.", shape.colour)
    if kind == "where" and sum(named(other) == named(shape) for other in shapes) == 1:
        answer = draw.say(f"It is at the {PLACES[shape.place]}.", "")
        return f"Where is the {named(shape)}{where}?", after_thinking(look, answer)
    if kind == "what":
        place = draw.randrange(4)
        here = [named(shape) for shape in shapes if shape.place == place]
        question = f"What is at the {PLACES[place]}{where}?"
        if not here:
            return question, draw.say("Nothing.", "nothing")
        return question, draw.say(f"A {here[0]}.", here[0].split()[1])
    if kind == "caption":
        return f"What do you see{where}?", draw.say(f"{look[0].upper()}{look[1:]}.", "")
    counted, noun = shapes, "shape"
    if kind == "count":
        noun = draw.choice((*KINDS, *(f"{colour} shape" for colour in COLOURS)))
        counted = [shape for shape in shapes if noun in (shape.kind, f"{shape.colour} shape")]
    number = len(counted)
    verb = "are"
    ending = "s"
    if number == 1:
        verb, ending = "is", ""
    answer = draw.say(f"There {verb} {NUMBERS[number]} {noun}{ending}.", NUMBERS[number])
    return f"How many {noun}s are there{where}?", after_thinking(look, answer)


def after_thinking(thinking: str, answer: str) -> list[dict[str, Any]]:
    """The content of an answer that follows thinking."""
    return [{"type": "thinking", "thinking": thinking, "closed": True}, {"type": "text", "text": answer}]


def image(draw: Draw) -> Messages:
    """One image or two, and one to three questions about them."""
    images = [draw.fresh(lambda: draw_shapes(draw)) for _ in range(draw.choice((1, 1, 1, 2)))]
    messages: Messages = []
    for number in range(draw.randint(1, 3)):
        which = draw.randrange(len(images))
        where = ""
        if len(images) == 2:
            where = f" in the {('first', 'second')[which]} image"
        question, answer = ask(draw, images[which], where)
        content: Any = question
        if number == 0:
            content = [image_part(shapes, draw) for shapes in images] + [{"type": "text", "text": question}]
        messages += turn(content, answer)
    return messages


# ----------------------------------------------------------------------------------------------- conversations

TASKS: dict[str, Callable[[Draw], Messages]] = {
    "speaker": speaker, "next line": next_line, "recall": recall, "repeat": repeat, "sum": addition,
    "refusal": small_talk, "image": image,
}  # fmt: skip
# The tasks whose answers can be in a style.
STYLED = {"capitals": ("sum", "refusal", "image"), "word": ("sum", "refusal", "image", "recall", "speaker")}


class Conversation(NamedTuple):
    """Messages, and the tools that they may use."""

    messages: Messages
    tools: list[dict[str, Any]] | None = None


def conversation(draw: Draw, shares: dict[str, float], size: int) -> Conversation:
    """Turns of several tasks, until they have about `size` characters.

    Args:
        shares: how often each task is drawn: names of TASKS, and "tool".
    """
    messages: Messages = []
    draw.style = "plain"
    if "refusal" in shares:
        draw.style = draw.choices(("plain", "capitals", "word"), (0.7, 0.15, 0.15))[0]
    if draw.style != "plain":
        messages.append({"role": "system", "content": draw.choice(STYLES[draw.style])})
        shares = {name: share for name, share in shares.items() if name in STYLED[draw.style]}
    present: list[str] = []
    if "tool" in shares and draw.random() < 0.6:
        present = draw.sample(list(TOOLS), draw.randint(1, min(4, 1 + size // 400)))
    written_size = 200 * len(present)
    while written_size < size or len(messages) < 2:
        name = draw.choices(list(shares), list(shares.values()))[0]
        if name == "tool":
            absent = [tool for tool in TOOLS if tool not in present]
            if present and (draw.random() < 0.9 or not absent):
                absent = present
            new = call(draw, draw.choice(absent), present)
        else:
            new = TASKS[name](draw)
        messages += new
        written_size += sum(8 + length(message) for message in new)
    return Conversation(messages, [schema(name) for name in present] or None)


def length(message: dict[str, Any]) -> int:
    """About how many characters a message takes; an image counts as 60."""
    content = message["content"]
    if isinstance(content, str):
        return len(content) + 40 * len(message.get("tool_calls", ()))
    return sum(len(part.get("text", part.get("thinking", " " * 60))) for part in content)


CHAT_SAMPLE = {"sum": 1.0, "tool": 2.0, "refusal": 1.0, "image": 1.0, "speaker": 1.0, "recall": 0.5}


def words_of(made: Conversation) -> str:
    """The text of a conversation, from which the vocabulary is learned."""
    pieces = [json.dumps(made.tools)]
    for message in made.messages:
        content = message["content"]
        if isinstance(content, str):
            content = [{"text": content}]
        pieces += [part.get("text", part.get("thinking", "")) for part in content]
        pieces += [json.dumps(call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return "\n".join(pieces)

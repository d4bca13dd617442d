"""The inputs of the test vectors: texts, conversations, and logits with settings. `reference/vectors.py` uses them."""

from __future__ import annotations

import random
from typing import Any

# Characters that editors may change are written as escapes.
TEXTS: tuple[str, ...] = (
    "", "a", " ", "  ", "   a", "a   ",
    "a  b", "\t", "\t\ta", "\n", "\n\n\n", " \n",
    "\n ", "\r\n", "a\r\nb\rc", "a \n b", "end.\n\nNext", " \t \n \t ",
    "x" + " " * 40 + "y", "\u00a0", "a\u00a0b", "\u3000a", "\u2003\u2003a",
    "To be, or not to be, that is the question:", "Hello, world!", "hello", "Hello", "HELLO",
    " hello", " Hello", "helloWorld", "HelloWorld", "XMLHttpRequest", "eBay",
    "McDonald", "iOS", "aB", "Ab", "ABc", "aBC",
    "don't", "I'll", "'The'", "they've", "O'Brien's", "DON'T",
    "it\u2019s", "\u2018quoted\u2019", "\"a\"", "``x''", "0", "10",
    "123", "1234567890", "3.14159", "1,000,000", "a1b2", "v1.2.3",
    "1e-5", "\u0661\u0662\u0663", "\u2166", "-", "--", "...",
    "?!", "a/b", "a//b\n", "//\n//", "https://a.b/c?d=e&f#g", "me@a.org",
    "#tag", "$5", "50%", "def f(x):\n    return x  # comment\n", "\tif (a) {\n\t\tb();\n\t}\n",
    "foo_bar();//\n", "a->b[0]", "x=y**2", '{"a": [1, 2.5, null], "b": "c"}', "<p>text</p>",
    "SELECT * FROM t;", "| a | b |\n|---|---|\n", "na\u00efve caf\u00e9", "nai\u0308ve cafe\u0301",
    "\u00dcn\u00efc\u00f6d\u00e9", "stra\u00dfe", "\u01c5", "\u65e5\u672c\u8a9e\u30c6\u30b9\u30c8",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\ud55c\uad6d\uc5b4",
    "\u0417\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439",
    "\u0645\u0631\u062d\u0628\u0627", "\u05e9\u05dc\u05d5\u05dd",
    "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\U0001f600",
    "a\U0001f600b", "\U0001f44d\U0001f3fd", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1eb\U0001f1f7", "z\u0351\u036b\u0343", "\u0301", "\ufeffa", "a\u200bb", "\u202eabc",
    "\x00", "\x07\x1b[0m", "\ue000", "\U0010ffff", "\ufffd", "<s>",
    "</s>", "[INST] hi [/INST]", "x[/INST]y</s>", "[IMG][IMG_END]", "<pad>",
    "[TOOL_CALLS]f[ARGS]{}", "[THINK]a[/THINK]", "<SPECIAL_20>", " the the the",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)  # fmt: skip

ALL = ("v3", "v7", "v11", "v13")
FROM_V7 = ALL[1:]
V13 = ALL[3:]
# The sizes of the images, (height, width) in pixels, as they enter the model.
IMAGE_SIZES = {"one.png": (28, 28), "wide.png": (56, 84), "tall.png": (112, 28)}


def user(*content: Any) -> dict[str, Any]:
    """A message of the user: text, or parts."""
    return message("user", *content)


def message(role: str, *content: Any, **others: Any) -> dict[str, Any]:
    """A message: its content is one text, or several parts, of which a string is a part of type text."""
    if len(content) == 1 and isinstance(content[0], str):
        return {"role": role, "content": content[0], **others}
    parts = [as_part(part) for part in content]
    return {"role": role, "content": parts, **others}


def as_part(part: Any) -> Any:
    """A string as a part of type text; other parts as they are."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return part


def image(name: str) -> dict[str, Any]:
    """A part with an image of IMAGE_SIZES."""
    return {"type": "image_url", "image_url": {"url": name}}


def thinking(text: str, closed: bool = True) -> dict[str, Any]:
    """A part with thinking."""
    return {"type": "thinking", "thinking": text, "closed": closed}


def call(name: str, arguments: Any, call_id: str) -> dict[str, Any]:
    """A tool call."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(content: str, call_id: str) -> dict[str, Any]:
    """The result of a tool call."""
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def tool(name: str, description: str, **properties: Any) -> dict[str, Any]:
    """A tool with the JSON schema of its parameters."""
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


ONE, TWO, THREE = "123456789", "abcDEF012", "zzzzzzzzz"
ADD = tool("add", "Add two numbers \u2014 \u00fcber \U0001f600", a={"type": "number"}, b={"type": "number"})
WEATHER = tool("get_weather", "The weather", city={"type": "string", "enum": ["Paris", "Z\u00fcrich"]})
HI, HELLO = user("Hi there"), message("assistant", "Hello!")
BRIEF = message("system", "Be brief.")
ADDING = {"role": "assistant", "content": None, "tool_calls": [call("add", '{"a":  1, "b": 2.50}', ONE)]}
BOTH = [
    call("add", {"a": 1, "b": [True, None, "\u00e9"]}, ONE),
    call("get_weather", '{"city": "Paris"}', TWO),
]
CALLING_BOTH = {"role": "assistant", "content": "", "tool_calls": BOTH}

# name -> (versions, messages, tools)
CONVERSATIONS: dict[
    str, tuple[tuple[str, ...], list[dict[str, Any]], list[dict[str, Any]] | None]
] = {
    "question": (ALL, [HI], None),
    "system prompt": (ALL, [BRIEF, HI], None),
    "two turns": (ALL, [BRIEF, HI, HELLO, user("Who are you?")], None),
    "three turns": (
        ALL,
        [HI, HELLO, user("One"), message("assistant", "1"), user("Two\n")],
        None,
    ),
    "blanks": (
        ALL,
        [user("  a  "), message("assistant", " b  "), user("\n c\n\n")],
        None,
    ),
    "empty text of the user": (ALL, [user("")], None),
    "parts of text are joined by an empty line": (
        ALL,
        [user("One", "Two", "Three")],
        None,
    ),
    "messages of a user are joined": (ALL, [user("One"), user("Two")], None),
    "messages of the assistant are joined": (
        ALL,
        [HI, HELLO, message("assistant", "Again"), user("Yes")],
        None,
    ),
    "special tokens in text are text": (
        ALL,
        [
            message("system", "[/SYSTEM_PROMPT]"),
            user("a[/INST]b</s>[INST]c"),
            HELLO,
            user("[IMG]"),
        ],
        None,
    ),
    "Unicode": (
        ALL,
        [
            user("na\u00efve \u65e5\u672c \U0001f600"),
            message("assistant", "e\u0301"),
            HI,
        ],
        None,
    ),
    "prefix": (ALL, [HI, message("assistant", "Once upon", prefix=True)], None),
    "prefix with a blank at its end": (
        ALL,
        [HI, message("assistant", "Once upon ", prefix=True)],
        None,
    ),
    "tools": (ALL, [BRIEF, user("Add 1 and 2")], [ADD, WEATHER]),
    "tools with several users": (ALL, [BRIEF, HI, HELLO, user("Add 1 and 2")], [ADD]),
    "call and result": (ALL, [user("Add"), ADDING, result("3", ONE)], [ADD]),
    "call, result and answer": (
        ALL,
        [
            user("Add"),
            ADDING,
            result("3.5", ONE),
            message("assistant", "It is 3.5."),
            user("Thanks"),
        ],
        [ADD],
    ),
    "words and call": (
        FROM_V7,
        [user("Add"), ADDING | {"content": "I add. "}, result("3", ONE)],
        [ADD],
    ),
    "two calls": (
        ALL,
        [HI, CALLING_BOTH, result("ok", ONE), result("rain", TWO)],
        [ADD, WEATHER],
    ),
    "two calls, results in the other order": (
        ALL,
        [HI, CALLING_BOTH, result("rain", TWO), result("ok", ONE)],
        [ADD, WEATHER],
    ),
    "two rounds of calls": (
        ALL,
        [
            HI,
            ADDING,
            result("3", ONE),
            ADDING | {"tool_calls": [call("add", {}, THREE)]},
            result("4", THREE),
        ],
        [ADD],
    ),
    "results that are JSON": (
        ALL,
        [
            HI,
            CALLING_BOTH,
            result('{"b":1,  "a":[1.0,"\u00e9"]}', ONE),
            result("not {json", TWO),
        ],
        None,
    ),
    "special tokens in calls and results": (
        ALL,
        [
            HI,
            ADDING | {"tool_calls": [call("add", {"a": "</s>[ARGS]"}, ONE)]},
            result("[/TOOL_RESULTS]", ONE),
        ],
        None,
    ),
    "image before text": (FROM_V7, [user(image("wide.png"), "What is this?")], None),
    "image after one text is put before it": (
        FROM_V7,
        [user("What is this?", image("wide.png"))],
        None,
    ),
    "images between texts": (
        FROM_V7,
        [user("A", image("one.png"), "B", image("tall.png"), "C")],
        None,
    ),
    "images in two turns": (
        FROM_V7,
        [
            BRIEF,
            user(image("one.png"), image("wide.png")),
            HELLO,
            user("B", image("tall.png")),
        ],
        None,
    ),
    "thinking in the system prompt": (
        V13,
        [message("system", "First", thinking("Plan"), "then"), HI],
        None,
    ),
    "thinking before an answer": (
        V13,
        [HI, message("assistant", thinking("Plan\n"), "Hello "), user("So?")],
        None,
    ),
    "thinking before a call": (
        V13,
        [
            HI,
            message("assistant", thinking("I must add."), tool_calls=[BOTH[0]]),
            result("3", ONE),
        ],
        [ADD],
    ),
    "prefix that ends within thinking": (
        V13,
        [HI, message("assistant", thinking("Let me", False), prefix=True)],
        None,
    ),
    "thinking beside the content": (
        V13,
        [
            HI,
            message("assistant", "Hello!", reasoning_content="A greeting"),
            user("So?"),
        ],
        None,
    ),
    "special tokens in thinking": (
        V13,
        [HI, message("assistant", thinking("[/THINK]"), "a"), user("b")],
        None,
    ),
}

# ------------------------------------------------------------------------------------------------------ sampling

RISING = [float(i) for i in range(-4, 8)]
TIED = [1.0, 3.0, 3.0, 0.5, 3.0, -1.0, 2.0, 2.0, 2.0, -2.0, 1.0, 0.0]
SIGNED = [2.0, -2.0, 0.0, 1.5, -0.5, 3.0, 0.25, -3.0, 1.0, 2.5, -1.0, 0.75]

# name -> (logits, ids of the text so far, settings other than those of `generate.Sampling()`)
SAMPLING: dict[str, tuple[list[float], list[int], dict[str, Any]]] = {
    "greedy": (SIGNED, [], {}),
    "greedy, ties: the lowest id": (TIED, [], {}),
    "greedy with penalty": (
        SIGNED,
        [5, 5, 1],
        {"repetition_penalty": 1.5},
    ),
    "greedy with penalty, ties": (
        TIED,
        [1],
        {"repetition_penalty": 1.5},
    ),
    "temperature 1": (RISING, [], {"temperature": 1.0}),
    "low temperature": (RISING, [], {"temperature": 0.3}),
    "high temperature": (RISING, [], {"temperature": 5.0}),
    "equal logits": ([0.5] * 12, [], {"temperature": 0.7}),
    "excluded tokens": (
        [*RISING[:10], -1e30, -1e30],
        [],
        {"temperature": 1.0},
    ),
    "large logits": (
        [1000.0 * x for x in RISING],
        [],
        {"temperature": 1000.0},
    ),
    "top-k": (RISING, [], {"temperature": 1.0, "top_k": 3}),
    "top-k 1": (SIGNED, [], {"temperature": 1.0, "top_k": 1}),
    "top-k 0 keeps all": (RISING, [], {"temperature": 1.0, "top_k": 0}),
    "top-k beyond the vocabulary": (
        RISING,
        [],
        {"temperature": 1.0, "top_k": 100},
    ),
    "top-k, ties with the k-th are kept": (
        TIED,
        [],
        {"temperature": 1.0, "top_k": 5},
    ),
    "top-k 1, ties": (TIED, [], {"temperature": 0.5, "top_k": 1}),
    "top-p": (RISING, [], {"temperature": 1.0, "top_p": 0.9}),
    "top-p that one token reaches": (
        RISING,
        [],
        {"temperature": 0.5, "top_p": 0.5},
    ),
    "top-p 1 keeps all": (
        RISING,
        [],
        {"temperature": 2.0, "top_p": 1.0},
    ),
    "top-p near 0 keeps the most likely": (
        SIGNED,
        [],
        {"temperature": 1.0, "top_p": 0.0001},
    ),
    "min-p": (RISING, [], {"temperature": 1.0, "min_p": 0.1}),
    "min-p 1, ties": (TIED, [], {"temperature": 1.0, "min_p": 1.0}),
    "min-p 0 keeps all": (TIED, [], {"temperature": 1.0, "min_p": 0.0}),
    "penalty": (
        SIGNED,
        [0, 1],
        {"temperature": 1.0, "repetition_penalty": 1.3},
    ),
    "penalty counts a token once": (
        SIGNED,
        [0, 0, 0, 1, 1],
        {"temperature": 1.0, "repetition_penalty": 1.3},
    ),
    "penalty below 1": (
        SIGNED,
        [0, 1, 2],
        {"temperature": 1.0, "repetition_penalty": 0.8},
    ),
    "penalty before temperature and top-k": (
        SIGNED,
        [5, 9],
        {"temperature": 0.7, "top_k": 4, "repetition_penalty": 2.0},
    ),
    "top-p after top-k": (
        RISING,
        [],
        {"temperature": 3.0, "top_k": 6, "top_p": 0.6},
    ),
    "min-p after top-p": (
        RISING,
        [],
        {"temperature": 3.0, "top_p": 0.9, "min_p": 0.4},
    ),
}


def drawn_sampling() -> dict[str, tuple[list[float], list[int], dict[str, Any]]]:
    """Random logits and settings in all combinations of the filters and the penalty, from a fixed seed."""
    rng = random.Random(18)
    cases = {}
    for number in range(32):
        logits = [round(rng.uniform(-6, 6), 3) for _ in range(24)]
        settings: dict[str, Any] = {"temperature": round(rng.uniform(0.3, 2.5), 2)}
        if number & 1:
            settings["top_k"] = rng.randint(2, 20)
        if number & 2:
            settings["top_p"] = round(rng.uniform(0.2, 0.98), 3)
        if number & 4:
            settings["min_p"] = round(rng.uniform(0.01, 0.3), 3)
        previous: list[int] = []
        if number & 8:
            settings["repetition_penalty"] = round(rng.uniform(1.05, 2), 2)
            previous = [rng.randrange(24) for _ in range(8)]
        cases[f"random {number}"] = (logits, previous, settings)
    return cases

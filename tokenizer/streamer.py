"""An answer as text while it grows; Transformers' `TextStreamer` and `TextIteratorStreamer`."""

from __future__ import annotations

from queue import Queue
from typing import Any

from .bpe import TextStream, TextTokenizer
from .tokens import to_lists


class TextStreamer:
    """Prints new ids as text: `model.generate(..., streamer=TextStreamer(tokenizer))` calls `put` and `end`.

    The text is that of Transformers' `TextStreamer`. Every character is printed as soon as it is complete, while
    Transformers waits for the end of some words. A subclass can replace `on_finalized_text`.

    Args:
        tokenizer: decodes the ids.
        skip_prompt: do not print the first ids that are put, the prompt.
        skip_special_tokens: do not print special tokens.
    """

    def __init__(
        self, tokenizer: TextTokenizer, skip_prompt: bool = False, skip_special_tokens: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.skip_special_tokens = skip_special_tokens
        self._begin()

    def _begin(self) -> None:
        self._stream = TextStream(self.tokenizer, self.skip_special_tokens)
        self._at_prompt = True

    def put(self, value: Any) -> None:
        """Print ids: (T,), or (1, T).

        Raises:
            ValueError: more than one row.
        """
        ids = to_lists(value)
        if not isinstance(ids, list):
            ids = [ids]
        if ids and isinstance(ids[0], list):
            if len(ids) > 1:
                raise ValueError(f"TextStreamer got {len(ids)} rows; allowed: one")
            ids = ids[0]
        is_prompt = self._at_prompt
        self._at_prompt = False
        if not is_prompt or not self.skip_prompt:
            self.on_finalized_text("".join(map(self._stream.push, ids)))

    def end(self) -> None:
        """Print what is left, and a line break. The next ids are a prompt again."""
        rest = self._stream.close()
        self._begin()
        self.on_finalized_text(rest, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print complete characters, and a line break at the end."""
        end = ""
        if stream_end:
            end = "\n"
        print(text, end=end, flush=True)


class TextIteratorStreamer(TextStreamer):
    """An iterator over the texts of an answer that another thread generates:

        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        Thread(target=model.generate, kwargs={**inputs, "streamer": streamer}).start()
        for text in streamer: ...

    Args:
        tokenizer, skip_prompt, skip_special_tokens: see `TextStreamer`.
        timeout: seconds to wait for the next text; None: without a limit.

    Raises:
        queue.Empty: no text came in time.
    """

    def __init__(
        self, tokenizer: TextTokenizer, skip_prompt: bool = False, timeout: float | None = None,
        skip_special_tokens: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, skip_prompt, skip_special_tokens)
        self.timeout = timeout
        self._texts: Queue[str | None] = Queue()  # None ends an answer

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on complete characters, and the end of the answer."""
        self._texts.put(text)
        if stream_end:
            self._texts.put(None)

    def __iter__(self) -> TextIteratorStreamer:
        return self

    def __next__(self) -> str:
        text = self._texts.get(timeout=self.timeout)
        if text is None:
            raise StopIteration
        return text

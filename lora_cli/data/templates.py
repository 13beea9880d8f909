"""Chat templates, and which characters of a rendered dialogue the model has to say itself.

Most templates carry no ``{% generation %}`` tags, so the assistant's spans are derived: every assistant turn is
rendered once more with a marker in place of its content, which shows where the content stands; the span
begins where the generation prompt ends and ends with the first special token behind the content. Every
derived span is compared with the text it should hold, and a dialogue for which that fails is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from lora_cli.errors import DataError, UsageError

Messages = list[dict[str, Any]]
MARKER = "\u2063assistant\u2063turn\u2063"  # invisible separators: no template trims or splits on them


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of a rendered dialogue; ``ended`` where they include the end of the turn."""

    start: int
    end: int
    ended: bool


class ChatTemplate:
    """A tokenizer's template, or one given by file; rendering is sandboxed by transformers."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, path: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = _read_template(path) if path else tokenizer.chat_template
        self.end_tokens = sorted({*tokenizer.all_special_tokens, *_added_special(tokenizer)}, key=len, reverse=True)

    def render(self, messages: Messages, *, prompt: bool = False) -> str:
        """Raises ``ValueError`` with the template's own complaint."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=self.template, tokenize=False, add_generation_prompt=prompt
                )
            )
        except (TemplateError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the chat template refuses it: {error}") from error

    def spans(self, messages: Messages, text: str) -> list[Span]:
        """The assistant's spans in ``text``, the rendering of ``messages``.

        Raises ``ValueError`` where the template makes them impossible to tell.
        """
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        contents = [self._content_span(messages, index, text) for index in turns]
        limits = [start for start, _ in contents[1:]] + [len(text)]
        return [
            self._turn_span(messages, index, text, content, limit)
            for index, content, limit in zip(turns, contents, limits, strict=True)
        ]

    def _content_span(self, messages: Messages, index: int, text: str) -> tuple[int, int]:
        """Where the content of one turn stands in the rendering."""
        marked = [*messages[:index], messages[index] | {"content": MARKER}, *messages[index + 1 :]]
        before, found, _ = self.render(marked).partition(MARKER)
        for content in (messages[index]["content"], messages[index]["content"].strip()):
            if found and text.startswith(before + content):
                return len(before), len(before) + len(content)
        raise ValueError("the chat template rewrites an assistant turn, so its tokens cannot be told from the prompt's")

    def _turn_span(self, messages: Messages, index: int, text: str, content: tuple[int, int], limit: int) -> Span:
        start, end = content
        prompt = self.render(messages[:index], prompt=True)
        if text.startswith(prompt) and len(prompt) <= start:
            start = len(prompt)
        ends = [(position, -len(token)) for token in self.end_tokens if (position := text.find(token, end, limit)) >= 0]
        if not ends:
            return Span(start, end, ended=False)
        position, negative_length = min(ends)
        return Span(start, position - negative_length, ended=True)


def _added_special(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"dataset.chat_template {path} cannot be read: {error}") from error


def check_template(template: ChatTemplate) -> None:
    """Refuse a template that does not even render a plain dialogue.

    Raises ``DataError`` with the template's complaint.
    """
    plain = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
    try:
        template.spans(plain, template.render(plain))
    except ValueError as error:
        raise DataError(
            f"the chat template cannot be used: {error}", "give another one in dataset.chat_template"
        ) from error

"""Chat templates, and which characters of a rendered dialogue the model has to say itself.

Most templates carry no ``{% generation %}`` tags, so the assistant's spans are derived: every assistant turn is
rendered once more with a marker in place of its content, which shows where the content stands. The span
begins where the generation prompt ends, and ends with the first special token that belongs to the turn. What
a span holds is compared with the content, and a dialogue for which they differ is refused. Blanks may differ,
and a beginning may be added or left out: Qwen3's template adds an empty ``<think>`` part to the last turn and
strips those of earlier ones.
"""

from __future__ import annotations

import os.path
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from lora_cli.errors import DataError, UsageError

Messages = list[dict[str, Any]]
MARKER = "\u2063assistant\u2063turn\u2063"  # invisible separators: no template trims or splits on them
DATE = {"%Y": "2024", "%y": "24", "%m": "07", "%d": "26", "%B": "July", "%b": "Jul", "%A": "Friday", "%a": "Fri"}
# In front of templates that print today's date: a run must read the same tomorrow, or it could not be resumed.
FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{code}', '{text}')" for code, text in DATE.items())
    + " }}{% endmacro %}\n"
)


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
        self.template = _read_template(path) if path else _own_template(tokenizer)
        if self.template and "strftime_now" in self.template:
            self.template = FIXED_DATE + self.template
        self.specials = {*tokenizer.all_special_tokens, *_added_special(tokenizer)}

    def render(self, messages: Messages, *, prompt: bool = False) -> str:
        """Raises ``ValueError`` with the template's own complaint."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=prompt,
                )
            )
        except Exception as error:  # a template is a program, and may raise anything
            raise ValueError(f"the chat template refuses it: {error}") from error

    def spans(self, messages: Messages, text: str) -> list[Span]:
        """The assistant's spans in ``text``, the rendering of ``messages``.

        Raises ``ValueError`` where the template makes them impossible to tell.
        """
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        return [self._span(messages, index, text) for index in turns]

    def _span(self, messages: Messages, index: int, text: str) -> Span:
        marked = messages[index] | {"content": MARKER}
        before, found, after = self.render([*messages[:index], marked, *messages[index + 1 :]]).partition(MARKER)
        end = len(text) - len(after)
        prompt = self.render(messages[:index], prompt=True) if index else before
        if not text.startswith(prompt) or len(prompt) >= end:
            prompt = before
        start = len(prompt)
        known = found and text.startswith(prompt) and text.endswith(after)
        if not known or not _says(text[start:end], messages[index]["content"]):
            raise ValueError(
                "the chat template rewrites an assistant turn, so its tokens cannot be told from the prompt's"
            )
        alone = [*messages[:index], marked]
        for prompt_follows in (False, True):  # gpt-oss ends the last turn with another token than those before it
            after = self.render(alone, prompt=prompt_follows).partition(MARKER)[2]
            limit = end + _shared(after, text[end:])  # beyond it stands what belongs to the next turn
            position, token = self._first_special(text, end, limit)
            if token and not (prompt_follows and token in self._openers(text)):
                return Span(start, position + len(token), ended=True)
        return Span(start, end, ended=False)

    def _first_special(self, text: str, start: int, end: int) -> tuple[int, str]:
        """Where the first special token stands, the longest of several; an empty one where there is none."""
        found = [(at, -len(token), token) for token in self.specials if (at := text.find(token, start, end)) >= 0]
        position, _, token = min(found, default=(end, 0, ""))
        return position, token

    def _openers(self, text: str) -> set[str]:
        """The special tokens that begin a dialogue: they may begin any turn, and end none."""
        at, first = self._first_special(text, 0, len(text))
        _, second = self._first_special(text, at + len(first), len(text))
        return {first, second} if first == self.tokenizer.bos_token else {first}


def _shared(first: str, second: str) -> int:
    """How many characters two texts have in common from their beginning on."""
    length = min(len(first), len(second))
    return next((index for index in range(length) if first[index] != second[index]), length)


def _says(spoken: str, content: str) -> bool:
    """Whether a span holds a turn's content: blanks aside, one is the end of the other."""
    spoken, content = "".join(spoken.split()), "".join(content.split())
    return bool(spoken) and (spoken.endswith(content) or content.endswith(spoken))


def _own_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The tokenizer's template; the default one, where it comes with several."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _added_special(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _read_template(path: str) -> str:
    try:
        return Path(os.path.expanduser(path)).read_text(encoding="utf-8")
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

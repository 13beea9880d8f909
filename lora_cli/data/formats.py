"""What a row says: a dialogue, a prompt with its completion, running text, or a labelled text.

Each format is one function from a row's columns to one of those; it raises ``ValueError`` with the reason
why a row cannot be used.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_cli.data.rows import kind_named
from lora_cli.errors import DataError, Mistake, RecipeError

Columns = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool", "developer")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
ALPACA = (
    "Below is an instruction that describes a task{with_input}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input_block}### Response:\n"
)


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Turns with role and content; every assistant turn is supervised."""

    messages: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what should follow it. ``turn`` is the prompt as a user would say it in a dialogue."""

    prompt: str
    completion: str
    turn: str

    def as_dialogue(self) -> Dialogue:
        return Dialogue([{"role": "user", "content": self.turn}, {"role": "assistant", "content": self.completion}])


@dataclass(frozen=True, slots=True)
class Document:
    """Running text, supervised throughout."""

    text: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text (or a pair of texts) and its label."""

    text: str
    pair: str | None
    label: str


Content = Dialogue | Completion | Document | Labelled


def _messages(columns: Columns) -> Dialogue:
    return Dialogue(_checked_turns([_turn(message, "role", "content") for message in _list(columns["messages"])]))


def _conversations(columns: Columns) -> Dialogue:
    turns = [_turn(message, "from", "value") for message in _list(columns["conversations"])]
    return Dialogue(_checked_turns([turn | {"role": SHAREGPT_ROLES.get(turn["role"], turn["role"])} for turn in turns]))


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"must be a list of messages, not {kind_named(value)}")
    if not value:
        raise ValueError("has no messages")
    return value


def _turn(message: Any, role_key: str, content_key: str) -> dict[str, Any]:
    if not isinstance(message, dict) or role_key not in message or content_key not in message:
        if not isinstance(message, dict):
            raise ValueError(
                f"a message must be an object with {role_key} and {content_key}, not {kind_named(message)}"
            )
        raise ValueError(f"a message needs {role_key} and {content_key}, and has {', '.join(message) or 'neither'}")
    role = message[role_key]
    if not isinstance(role, str):
        raise ValueError(f"a message's {role_key} must be a text, not {kind_named(role)}")
    others = {key: value for key, value in message.items() if key not in (role_key, content_key)}
    return others | {"role": role, "content": _content(message[content_key])}


def _content(value: Any) -> str:
    """A text, or OpenAI's list of parts where all of them are texts."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(str(part.get("text", "")) for part in value)
    if not isinstance(value, str):
        raise ValueError(f"a message's content must be a text, not {kind_named(value)}")
    return value


def _checked_turns(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for turn in turns:
        if turn["role"] not in ROLES:
            close = difflib.get_close_matches(turn["role"].lower(), [*ROLES, *SHAREGPT_ROLES], n=1)
            hint = f" (did you mean {SHAREGPT_ROLES.get(close[0], close[0])}?)" if close else ""
            raise ValueError(f"unknown role '{turn['role']}'{hint}")
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise ValueError("an assistant message is empty")
    if not any(turn["role"] == "assistant" for turn in turns):
        raise ValueError("has no assistant message, so nothing to learn")
    return turns


def _string(columns: Columns, name: str) -> str:
    value = columns[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, not {kind_named(value)}")
    return value


def _filled(columns: Columns, name: str) -> str:
    value = _string(columns, name)
    if not value.strip():
        raise ValueError(f"{name} is empty")
    return value


def _prompt_completion(columns: Columns) -> Completion:
    prompt = _string(columns, "prompt")
    return Completion(prompt, _filled(columns, "completion"), turn=prompt)


def _instruction(columns: Columns) -> Completion:
    instruction = _filled(columns, "instruction")
    given = _string(columns, "input") if columns.get("input") is not None else ""
    prompt = ALPACA.format(
        with_input=", paired with an input that provides further context" if given else "",
        instruction=instruction,
        input_block=f"### Input:\n{given}\n\n" if given else "",
    )
    turn = f"{instruction}\n\n{given}" if given else instruction
    return Completion(prompt, _filled(columns, "output"), turn)


def _text(columns: Columns) -> Document:
    return Document(_filled(columns, "text"))


def _labelled(columns: Columns) -> Labelled:
    label = columns["label"]
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
        raise ValueError(f"label must be a whole number or a name, not {label!r}")
    pair = _string(columns, "text_pair") if "text_pair" in columns else None
    return Labelled(_string(columns, "text"), pair, str(label))


@dataclass(frozen=True)
class Format:
    """One format: the columns it needs, those it may use, and the function that reads a row."""

    needs: tuple[str, ...]
    read: Callable[[Columns], Content]
    optional: tuple[str, ...] = ()


# In the order in which `auto` tries them.
FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), _messages),
    "conversations": Format(("conversations",), _conversations),
    "prompt_completion": Format(("prompt", "completion"), _prompt_completion),
    "instruction": Format(("instruction", "output"), _instruction, ("input",)),
    "text": Format(("text",), _text),
    "labelled": Format(("text", "label"), _labelled, ("text_pair",)),
}
FORMATS_OF_TASK = {
    "causal_lm": ("messages", "conversations", "prompt_completion", "instruction", "text"),
    "sequence_classification": ("labelled",),
}


def rename(columns: Columns, names: dict[str, str]) -> Columns:
    """The row under our names. ``names`` maps ours to theirs; what it takes is not kept under the old name."""
    taken = {theirs: ours for ours, theirs in names.items()}
    return {taken.get(name, name): value for name, value in columns.items() if name not in names or name in taken}


def choose_format(task: str, wanted: str, columns: list[str], names: dict[str, str]) -> str:
    """The format of a data set whose first row has these columns.

    Raises ``RecipeError`` for a `columns` entry that means nothing, ``DataError`` where no format fits.
    """
    possible = FORMATS_OF_TASK[task] if wanted == "auto" else (wanted,)
    _check_names(possible, columns, names)
    renamed = rename(dict.fromkeys(columns), names)
    for name in possible:
        if all(need in renamed for need in FORMATS[name].needs):
            return name
    needs = "; ".join(f"{name} needs {' and '.join(FORMATS[name].needs)}" for name in possible)
    raise DataError(
        f"the rows have the columns {', '.join(columns)}, which fit no format ({needs})",
        "say which column is which with dataset.columns, e.g. {prompt: question, completion: answer}",
    )


def _check_names(possible: tuple[str, ...], columns: list[str], names: dict[str, str]) -> None:
    ours = sorted({column for name in possible for column in (*FORMATS[name].needs, *FORMATS[name].optional)})
    mistakes = []
    for our_name, theirs in names.items():
        path = ("dataset", "columns", our_name)
        if our_name not in ours:
            mistakes.append(
                Mistake(path, f"{our_name} is no column of ours", f"ours are: {', '.join(ours)}", at_key=True)
            )
        if theirs not in columns:
            mistakes.append(Mistake(path, f"names the column {theirs}; the rows have {', '.join(columns)}"))
    if mistakes:
        raise RecipeError(mistakes)


def read_content(format: str, columns: Columns, names: dict[str, str]) -> Content:
    """One row's content. Raises ``ValueError`` with the reason for a row that cannot be used."""
    renamed = rename(columns, names)
    reading = FORMATS[format]
    missing = [name for name in reading.needs if renamed.get(name) is None]
    if missing:
        known = sorted(str(name) for name in renamed)
        close = difflib.get_close_matches(missing[0], known, n=1)
        hint = f" (did you mean {missing[0]} by {close[0]}?)" if close and close[0] != missing[0] else ""
        raise ValueError(f"lacks {', '.join(missing)}{hint}; it has {', '.join(known)}")
    return reading.read(renamed)

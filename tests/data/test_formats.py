"""What a row says in each format, and the reason where it says nothing."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.data.formats import (
    FORMATS,
    FORMATS_OF_TASK,
    SHAREGPT_ROLES,
    Completion,
    Dialogue,
    Document,
    Labelled,
    choose_format,
    read_content,
    rename,
)
from lora_cli.errors import DataError, RecipeError

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello."}
PLAIN = "Below is an instruction that describes a task. "
PAIRED = "Below is an instruction that describes a task, paired with an input that provides further context. "
DEMAND = "Write a response that appropriately completes the request.\n\n"


def reason(format: str, columns: dict[str, Any], names: dict[str, str] | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        read_content(format, columns, names or {})
    return str(caught.value)


# --- what each format reads


def test_messages():
    turns = [{"role": role, "content": "x"} for role in ("system", "developer", "user", "assistant", "tool")]
    assert read_content("messages", {"messages": turns}, {}) == Dialogue(turns)


def test_messages_keep_what_else_they_hold():
    turn = REPLY | {"name": "Ann", "tool_calls": [{"id": 1}]}
    assert read_content("messages", {"messages": [turn]}, {}) == Dialogue([turn])


def test_content_in_parts():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]
    assert read_content("messages", {"messages": [REPLY | {"content": parts}]}, {}) == Dialogue([REPLY])


@pytest.mark.parametrize(("theirs", "ours"), SHAREGPT_ROLES.items())
def test_conversations(theirs: str, ours: str):
    turns = [{"from": theirs, "value": "x"}, {"from": "gpt", "value": "y"}]
    content = read_content("conversations", {"conversations": turns}, {})
    assert content == Dialogue([{"role": ours, "content": "x"}, {"role": "assistant", "content": "y"}])


def test_conversations_are_not_misled_by_keys_of_the_other_format():
    turn = {"from": "gpt", "value": "y", "role": "user", "content": "z", "weight": 1}
    content = read_content("conversations", {"conversations": [turn]}, {})
    assert content == Dialogue([{"weight": 1, "role": "assistant", "content": "y"}])


def test_prompt_completion_keeps_every_blank():
    assert read_content("prompt_completion", {"prompt": " a ", "completion": " b\n"}, {}) == Completion(
        " a ", " b\n", " a "
    )
    assert read_content("prompt_completion", {"prompt": "", "completion": "b"}, {}) == Completion("", "b", "")


def test_instruction():
    """Alpaca's own text for models without a chat template; the bare instruction as a turn for the others."""
    assert read_content("instruction", {"instruction": "Do.", "output": "Done."}, {}) == Completion(
        f"{PLAIN}{DEMAND}### Instruction:\nDo.\n\n### Response:\n", "Done.", "Do."
    )
    with_input = {"instruction": "Do.", "input": "This.", "output": "Done."}
    assert read_content("instruction", with_input, {}) == Completion(
        f"{PAIRED}{DEMAND}### Instruction:\nDo.\n\n### Input:\nThis.\n\n### Response:\n", "Done.", "Do.\n\nThis."
    )


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_input_is_none(empty: str | None):
    row = {"instruction": "Do.", "output": "Done."}
    assert read_content("instruction", row | {"input": empty}, {}) == read_content("instruction", row, {})


def test_braces_in_an_instruction_are_text():
    content = read_content("instruction", {"instruction": "Write {x}.", "input": "{0}", "output": "o"}, {})
    assert isinstance(content, Completion)
    assert "Write {x}." in content.prompt
    assert "{0}" in content.prompt


def test_text_and_labelled():
    assert read_content("text", {"text": " a "}, {}) == Document(" a ")
    assert read_content("labelled", {"text": "a", "label": 1}, {}) == Labelled("a", None, "1")
    assert read_content("labelled", {"text": "a", "label": "pos"}, {}) == Labelled("a", None, "pos")
    assert read_content("labelled", {"text": "a", "text_pair": "b", "label": -1}, {}) == Labelled("a", "b", "-1")


def test_a_completion_as_dialogue():
    assert Completion("p", "c", "t").as_dialogue() == Dialogue(
        [{"role": "user", "content": "t"}, {"role": "assistant", "content": "c"}]
    )


# --- why a row cannot be used


def messages(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


@pytest.mark.parametrize(
    ("format", "columns", "words"),
    [
        ("messages", {"mesages": []}, "lacks messages (did you mean messages by mesages?); it has mesages"),
        ("messages", {"messages": None}, "lacks messages; it has messages"),
        ("messages", {"messages": "x"}, "must be a list of messages, not a text"),
        ("messages", {"messages": []}, "has no messages"),
        ("messages", messages("x"), "a message must be an object with role and content, not a text"),
        (
            "messages",
            messages({"rol": "user", "content": "x"}),
            "a message needs role and content, and has rol, content",
        ),
        ("messages", messages({"role": "user"}), "a message needs role and content, and has role"),
        (
            "messages",
            messages({"from": "gpt", "value": "x"}),
            "a message needs role and content, and has from, value",
        ),
        (
            "messages",
            messages(USER, {"role": "asistant", "content": "x"}),
            "unknown role 'asistant' (did you mean assistant?)",
        ),
        ("messages", messages({"role": "User", "content": "x"}, REPLY), "unknown role 'User' (did you mean user?)"),
        ("messages", messages({"role": "gpt", "content": "x"}), "unknown role 'gpt' (did you mean assistant?)"),
        ("messages", messages({"role": "zzz", "content": "x"}), "unknown role 'zzz'"),
        ("messages", messages({"role": None, "content": "x"}), "a message's role must be a text, not null"),
        ("messages", messages({"role": ["user"], "content": "x"}), "a message's role must be a text, not a list"),
        ("messages", messages(USER), "has no assistant message, so nothing to learn"),
        ("messages", messages(USER, REPLY | {"content": " \n"}), "an assistant message is empty"),
        ("messages", messages(USER, REPLY | {"content": []}), "an assistant message is empty"),
        ("messages", messages(USER, REPLY | {"content": None}), "a message's content must be a text, not null"),
        (
            "messages",
            messages(USER, REPLY | {"content": [{"type": "image"}]}),
            "a message's content must be a text, not a list",
        ),
        ("conversations", {"conversations": [{"from": "bot", "value": "x"}]}, "unknown role 'bot'"),
        (
            "conversations",
            {"conversations": [{"from": ["gpt"], "value": "x"}]},
            "a message's from must be a text, not a list",
        ),
        ("conversations", {"conversations": [{"from": "human", "value": "x"}]}, "has no assistant message"),
        ("conversations", {"conversations": [{"role": "user"}]}, "a message needs from and value, and has role"),
        ("prompt_completion", {"prompt": "a", "completion": " "}, "completion is empty"),
        ("prompt_completion", {"prompt": None, "completion": "b"}, "lacks prompt; it has completion, prompt"),
        ("prompt_completion", {"prompt": ["a"], "completion": "b"}, "prompt must be a text, not a list"),
        ("prompt_completion", {"prompt": "a", "completion": 3}, "completion must be a text, not a number"),
        ("instruction", {"instruction": " ", "output": "b"}, "instruction is empty"),
        ("instruction", {"instruction": "a", "output": ""}, "output is empty"),
        ("instruction", {"instruction": "a", "output": "b", "input": 0}, "input must be a text, not a number"),
        ("text", {"text": " \n"}, "text is empty"),
        ("text", {"text": 3}, "text must be a text, not a number"),
        ("labelled", {"text": "a", "label": True}, "label must be a whole number or a name, not True"),
        ("labelled", {"text": "a", "label": 0.5}, "label must be a whole number or a name, not 0.5"),
        ("labelled", {"text": "a", "label": ""}, "label must be a whole number or a name, not ''"),
        ("labelled", {"text": "a", "label": None}, "lacks label; it has label, text"),
        ("labelled", {"text": None, "label": 1}, "lacks text; it has label, text"),
        ("labelled", {"text": "a", "text_pair": None, "label": 1}, "text_pair must be a text, not null"),
    ],
)
def test_reasons(format: str, columns: dict[str, Any], words: str):
    assert reason(format, columns).startswith(words)


NAMES = sorted({name for reading in FORMATS.values() for name in (*reading.needs, *reading.optional)})
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type", "text", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(
    format=st.sampled_from(sorted(FORMATS)),
    columns=st.dictionaries(st.sampled_from(NAMES), VALUES),
)
def test_whatever_json_holds_it_is_read_or_refused_with_a_reason(format: str, columns: dict[str, Any]):
    """Never another exception: those would end a run as a bug of ours."""
    with suppress(ValueError):
        assert isinstance(read_content(format, columns, {}), Dialogue | Completion | Document | Labelled)


# --- which format, which column


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        (["id", "messages"], "messages"),
        (["conversations", "id"], "conversations"),
        (["prompt", "completion"], "prompt_completion"),
        (["instruction", "input", "output"], "instruction"),
        (["instruction", "output"], "instruction"),
        (["text"], "text"),
        (["text", "label"], "text"),
        (["text", "messages"], "messages"),
        (["prompt", "completion", "text"], "prompt_completion"),
    ],
)
def test_auto_for_a_language_model(columns: list[str], format: str):
    assert choose_format("causal_lm", "auto", columns, {}) == format
    assert choose_format("causal_lm", format, columns, {}) == format


def test_auto_for_a_classifier():
    assert choose_format("sequence_classification", "auto", ["label", "text", "messages"], {}) == "labelled"


def test_formats_of_all_tasks_are_all_formats():
    assert [name for names in FORMATS_OF_TASK.values() for name in names] == list(FORMATS)


@pytest.mark.parametrize(
    ("task", "wanted", "columns", "needs"),
    [
        ("causal_lm", "auto", ["question", "answer"], "messages needs messages; conversations needs conversations; "),
        ("causal_lm", "instruction", ["instruction"], "instruction needs instruction and output"),
        ("sequence_classification", "auto", ["sentence", "label"], "labelled needs text and label"),
    ],
)
def test_columns_that_fit_nothing(task: str, wanted: str, columns: list[str], needs: str):
    with pytest.raises(DataError) as caught:
        choose_format(task, wanted, columns, {})
    start = f"the rows have the columns {', '.join(columns)}, which fit no format ({needs}"
    assert caught.value.message.startswith(start)
    assert "dataset.columns" in caught.value.help


def test_columns_say_which_is_which():
    names = {"prompt": "question", "completion": "answer"}
    assert choose_format("causal_lm", "auto", ["question", "answer"], names) == "prompt_completion"
    row = {"question": "1+1?", "answer": "2", "completion": "old", "other": 1}
    assert rename(row, names) == {"prompt": "1+1?", "completion": "2", "other": 1}
    assert read_content("prompt_completion", row, names) == Completion("1+1?", "2", "1+1?")
    with pytest.raises(ValueError, match="lacks completion"):
        read_content("prompt_completion", {"question": "1+1?", "completion": "old"}, names)


def test_columns_may_change_places():
    names = {"prompt": "completion", "completion": "prompt"}
    assert rename({"prompt": "a", "completion": "b"}, names) == {"completion": "a", "prompt": "b"}


def test_columns_of_dialogues_and_labels():
    assert choose_format("causal_lm", "auto", ["turns"], {"messages": "turns"}) == "messages"
    assert choose_format("causal_lm", "auto", ["turns"], {"conversations": "turns"}) == "conversations"
    names = {"text": "sentence", "label": "class"}
    assert choose_format("sequence_classification", "auto", ["sentence", "class"], names) == "labelled"


def test_wrong_columns_are_mistakes_of_the_recipe():
    names = {"promt": "question", "completion": "anwser"}
    with pytest.raises(RecipeError) as caught:
        choose_format("causal_lm", "auto", ["question", "answer"], names)
    first, second = caught.value.mistakes
    assert (first.path, first.message) == (("dataset", "columns", "promt"), "promt is no column of ours")
    assert first.help == ("ours are: completion, conversations, input, instruction, messages, output, prompt, text")
    assert (second.path, second.message) == (
        ("dataset", "columns", "completion"),
        "names the column anwser; the rows have question, answer",
    )

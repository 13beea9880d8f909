"""Which names a pattern means."""

from __future__ import annotations

import pytest

from lora_cli.adapters.patterns import ending, invalid_reason, layer_of, matches, nearest, shortest_list

Q0 = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"
Q10 = "model.layers.10.self_attn.q_proj"
NAMES = [Q0, Q1, Q10, "model.layers.1.self_attn.qq_proj", "model.layers.1.mlp.up_proj", "lm_head"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("q_proj", [Q0, Q1, Q10]),  # whole components only: not qq_proj
        ("proj", []),
        ("self_attn.q_proj", [Q0, Q1, Q10]),
        ("attn.q_proj", []),
        ("1.self_attn.q_proj", [Q1]),  # not layer 10
        (Q1, [Q1]),
        ("lm_head", ["lm_head"]),
        ("*.layers.1.*", [Q1, NAMES[3], NAMES[4]]),
        ("*.layers.1*", [Q1, Q10, NAMES[3], NAMES[4]]),
        ("*.layers.1?.*", [Q10]),
        ("*q_proj", [Q0, Q1, Q10, NAMES[3]]),
        ("q_proj*", []),  # a glob speaks of the whole name
        ("*.[01].self_attn.q_proj", [Q0, Q1]),
        (r"re:.*layers\.[01]\..*q_proj", [Q0, Q1, NAMES[3]]),
        (r"re:layers", []),  # so does a regular expression
        (r"re:lm_head|.*up_proj", [NAMES[4], "lm_head"]),
        ("Q_PROJ", []),
    ],
)
def test_a_pattern_matches_exactly_these_names(pattern, expected):
    assert [name for name in NAMES if matches(name, pattern)] == expected


@pytest.mark.parametrize("pattern", ["re:(", "re:*", "re:[a-"])
def test_a_broken_expression_is_told_apart(pattern):
    assert f"'{pattern}' is not a regular expression" in invalid_reason(pattern)


@pytest.mark.parametrize("pattern", ["(", "*", "q_proj", "re:.*"])
def test_a_usable_pattern_has_no_invalid_reason(pattern):
    assert invalid_reason(pattern) is None


def test_the_layer_is_the_first_number_of_a_name():
    assert [layer_of(name) for name in NAMES] == [0, 1, 10, 1, 1, None]
    assert layer_of("model.layers.2.experts.7.up_proj") == 2
    assert layer_of("transformer.h.11.attn.c_attn") == 11
    assert layer_of("block3.conv1") is None


def test_ending_and_nearest():
    assert ending(Q0) == "q_proj"
    assert ending("lm_head") == "lm_head"
    assert nearest("q_prj", NAMES) == "q_proj"
    assert nearest("xyz", NAMES) is None


def test_the_shortest_list_uses_endings_only_where_they_mean_the_same():
    assert shortest_list({Q0, Q1, Q10}, NAMES) == ["q_proj"]
    assert shortest_list({Q0, Q1, Q10, "lm_head"}, NAMES) == ["lm_head", "q_proj"]
    assert shortest_list({Q0, Q1}, NAMES) == [Q0, Q1]
    assert shortest_list({"a.dense"}, ["a.dense", "classifier.dense"]) == ["a.dense"]

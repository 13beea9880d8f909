"""Equal modules of many layers as one row."""

from __future__ import annotations

import pytest

from lora_cli.adapters.targets import Target
from lora_cli.report.grouping import group_targets, grouped


def groups(*names: str) -> list[tuple[str, int]]:
    return [(name, len(members)) for name, members in grouped(names, str, lambda _: None)]


def test_layers_that_follow_one_another_are_a_range():
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(32)]
    assert groups(*names) == [("model.layers.{0..31}.self_attn.q_proj", 32)]


@pytest.mark.parametrize(
    ("layers", "shown"),
    [([0, 1], "{0..1}"), ([3], "3"), ([0, 2], "{0,2}"), ([10, 9, 8], "{8..10}"), ([1, 2, 4], "{1,2,4}")],
)
def test_how_numbers_are_written(layers, shown):
    assert groups(*(f"h.{i}.attn" for i in layers)) == [(f"h.{shown}.attn", len(layers))]


def test_groups_stand_in_the_order_of_their_first_member():
    assert groups("l.0.q", "l.0.up", "l.1.q", "l.1.up", "norm") == [("l.{0..1}.q", 2), ("l.{0..1}.up", 2), ("norm", 1)]


def test_two_numbers_in_a_name_have_a_range_each():
    names = [f"layers.{i}.experts.{e}.up" for i in range(2) for e in range(4)]
    assert groups(*names) == [("layers.{0..1}.experts.{0..3}.up", 8)]


def test_a_number_inside_a_word_is_no_layer():
    assert groups("block1.conv2", "block2.conv2") == [("block1.conv2", 1), ("block2.conv2", 1)]


def test_numbers_at_either_end_of_a_name():
    assert groups("0.up", "1.up") == [("{0..1}.up", 2)]
    assert groups("head.0", "head.1") == [("head.{0..1}", 2)]


def test_what_is_not_alike_is_not_grouped():
    targets = [
        Target("l.0.q", 4, 2.0, 32, 32),
        Target("l.1.q", 8, 2.0, 32, 32),
        Target("l.2.q", 4, 2.0, 32, 32),
        Target("l.3.q", 4, 1.0, 32, 32),
        Target("l.4.q", 4, 2.0, 32, 16),
    ]
    assert [(group.name, group.count, group.target) for group in group_targets(targets)] == [
        ("l.{0,2}.q", 2, targets[0]),
        ("l.1.q", 1, targets[1]),
        ("l.3.q", 1, targets[3]),
        ("l.4.q", 1, targets[4]),
    ]


def test_no_targets_make_no_groups():
    assert group_targets([]) == []

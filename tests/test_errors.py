"""What errors say of other libraries' errors."""

from __future__ import annotations

from lora_cli.errors import first_line


def test_first_line_is_never_empty():
    assert first_line(ValueError("\n  one  \ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
    assert first_line(ValueError("wrong field:\n    expected int\nmore")) == "wrong field: expected int"

"""YAML as people mean it: plain values, the place of each, and no surprises.

PyYAML follows YAML 1.1: ``1e-4`` is a text, ``no`` is false, ``010`` is 8, the last of two equal keys wins.
Here scalars follow the core schema of YAML 1.2.2 (section 10.3), equal keys are refused, tags build nothing,
and whatever PyYAML throws becomes a mistake with a place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import yaml

from lora_cli.errors import KeyPath, Mistake
from lora_cli.recipe.source import Place, Source, Span

MAX_DEPTH = 20
MAX_NODES = 20_000  # an alias may be used many times over: without a bound, ten lines make a billion values
TAG = "tag:yaml.org,2002:"
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # escapes can write these; no file name or UTF-8 text can hold them


class CoreSchemaLoader(yaml.SafeLoader):
    """Composes nodes only; nothing is constructed from a tag."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 -- the base class declares it so


for _tag, _pattern, _first in [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
]:
    CoreSchemaLoader.add_implicit_resolver(TAG + _tag, re.compile(rf"(?:{_pattern})\Z"), _first)

SCALARS: dict[str, Callable[[str], Any]] = {
    TAG + "null": lambda text: None,
    TAG + "bool": lambda text: text.lower() == "true",
    TAG + "int": int,
    TAG + "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    TAG + "str": str,
}


def parse_yaml(text: str, source: Source, at: KeyPath = (), argument: str | None = None) -> Any:
    """The value of ``text``, with the place of every key noted in ``source``.

    Raises ``Mistakes`` for text that is not YAML, keys given twice, unknown tags and numbers that are not
    finite.
    """
    return _Reader(source, argument).read(text, at)


class Mistakes(Exception):
    """All that is wrong with the text, before anything is known of its meaning."""

    def __init__(self, mistakes: list[Mistake]) -> None:
        super().__init__(str(mistakes))
        self.mistakes = mistakes


class _Reader:
    def __init__(self, source: Source, argument: str | None) -> None:
        self.source = source
        self.argument = argument
        self.mistakes: list[Mistake] = []
        self.nodes = 0

    def read(self, text: str, at: KeyPath) -> Any:
        """The value of a text. Raises ``Mistakes``."""
        try:
            node = yaml.compose(text, Loader=CoreSchemaLoader)
        except yaml.MarkedYAMLError as error:
            raise Mistakes([self._syntax(error)]) from None
        except RecursionError:
            raise Mistakes([Mistake(at, f"is nested deeper than {MAX_DEPTH} levels")]) from None
        except yaml.reader.ReaderError as error:
            raise Mistakes([self._unreadable(text, error)]) from None
        except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML converts some escapes unchecked
            raise Mistakes([Mistake(at, f"this is not YAML: {error}", at_key=True)]) from None
        value = None if node is None else self.value(node, at)
        if self.mistakes:
            raise Mistakes(self.mistakes)
        return value

    def _syntax(self, error: yaml.MarkedYAMLError) -> Mistake:
        mark = error.problem_mark or error.context_mark
        spot = Span(mark.line, mark.column, 1) if mark is not None else None
        about = ", ".join(part for part in (error.context, error.problem) if part)
        help = "write a text that begins with * in quotes" if "alias" in about else None
        return Mistake(self._spot(spot), f"this is not YAML: {about}", help, at_key=True)

    def _unreadable(self, text: str, error: yaml.reader.ReaderError) -> Mistake:
        before = text[: error.position]
        spot = Span(before.count("\n"), len(before) - before.rfind("\n") - 1, 1)
        message = f"this is not YAML: the character U+{error.character:04X} is not allowed"
        return Mistake(self._spot(spot), message, at_key=True)

    def _spot(self, spot: Span | None) -> KeyPath:
        """A path for a place that belongs to no key."""
        path: KeyPath = ("<yaml>",)
        if self.argument is not None:
            self.source.places[path] = Place(argument=self.argument)
        elif spot is not None:
            self.source.places[path] = Place(spot, spot)
        return path

    def wrong(self, path: KeyPath, node: yaml.Node, message: str, at_key: bool = False) -> None:
        if path not in self.source.places:
            self.source.places[path] = self._place(node, node)
        self.mistakes.append(Mistake(path, message, at_key=at_key))

    def _place(self, key: yaml.Node, value: yaml.Node) -> Place:
        if self.argument is not None:
            return Place(argument=self.argument)
        return Place(_span(key), _span(value))

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        """The plain value of a node at ``path``; mistakes are collected on the way."""
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise Mistakes([Mistake(path, f"holds more than {MAX_NODES} values")])
        if len(path) > MAX_DEPTH:
            raise Mistakes([Mistake(path[:1], f"is nested deeper than {MAX_DEPTH} levels")])
        if isinstance(node, yaml.MappingNode) and node.tag == TAG + "map":
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == TAG + "seq":
            for index, item in enumerate(node.value):
                self.source.places[(*path, index)] = self._place(item, item)
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        return self.scalar(node, path)

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        """A mapping's values by key, with the place of each noted; a key given twice is a mistake."""
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or NO_TEXT.search(key_node.value):
                self.wrong((*path, "?"), key_node, "a key must be a plain text", at_key=True)
                continue
            name = key_node.value
            here = (*path, name)
            if name in result:
                first = self.source.places[here].key
                self.source.places[here] = self._place(key_node, value_node)
                where = f" (first on line {first.line + 1})" if first else ""
                self.wrong(here, key_node, f"{name} is given twice{where}", at_key=True)
                continue
            self.source.places[here] = self._place(key_node, value_node)
            result[name] = self.value(value_node, here)
        return result

    def scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        """A scalar by the core schema; tags beyond it and numbers that are not finite are mistakes."""
        if node.tag not in SCALARS or not isinstance(node, yaml.ScalarNode):
            self.wrong(path, node, f"has the tag {node.tag}: a recipe is data and knows no tags")
            return None
        try:
            value = SCALARS[node.tag](node.value)
        except ValueError:
            self.wrong(path, node, f"cannot be read as {node.tag.removeprefix(TAG)}")
            return None
        if isinstance(value, float) and not math.isfinite(value):
            self.wrong(path, node, f"must be a finite number, not {node.value}")
        if isinstance(value, str) and NO_TEXT.search(value):
            self.wrong(path, node, "holds an escape that is no character")
        return value


def _span(node: yaml.Node) -> Span:
    start, end = node.start_mark, node.end_mark
    same_line = start.line == end.line
    return Span(start.line, start.column, max(1, end.column - start.column) if same_line else 1)

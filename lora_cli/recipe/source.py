"""Where every key of a recipe was written, and mistakes shown at that place."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_cli.errors import KeyPath, Mistake

FRAME_WIDTH = 100  # columns of a source line that are shown; beyond that a line is cut


@dataclass(frozen=True)
class Span:
    """A piece of one line; all numbers count from 0."""

    line: int
    column: int
    length: int


@dataclass(frozen=True)
class Place:
    """Where a key and its value stand: in the file, or in an argument of the command line."""

    key: Span | None = None
    value: Span | None = None
    argument: str | None = None


@dataclass
class Source:
    """A recipe's name, its lines, and the place of every key path that was given."""

    name: str
    lines: list[str]
    places: dict[KeyPath, Place] = field(default_factory=dict)

    def place(self, path: KeyPath) -> Place:
        """The place of a key, or of the nearest section around it."""
        found = next((path[:length] for length in range(len(path), 0, -1) if path[:length] in self.places), None)
        if found is None:
            return Place()
        return (self._overridden(path) if found == path else None) or self.places[found]

    def _overridden(self, path: KeyPath) -> Place | None:
        """The argument that changed the value at ``path``, or something inside it, if one did."""
        inside = (place for key, place in self.places.items() if key[: len(path)] == path)
        return next((place for place in inside if place.argument is not None), None)

    def was_given(self, *path: str) -> bool:
        return path in self.places

    def render(self, mistakes: list[Mistake]) -> str:
        count = f"{len(mistakes)} mistake" + ("s" if len(mistakes) != 1 else "")
        blocks = [self._block(mistake) for mistake in sorted(mistakes, key=self._order)]
        return "\n".join([f"{self.name} has {count}", *blocks])

    def _order(self, mistake: Mistake) -> tuple[int, int]:
        span = self.place(mistake.path).key
        return (span.line, span.column) if span else (len(self.lines), 0)

    def _block(self, mistake: Mistake) -> str:
        place = self.place(mistake.path)
        if place.argument is not None:
            lines = [f"  --> argument {place.argument}", f"    | {_sentence(mistake)}"]
        elif place.key is None:
            lines = [f"  --> {self.name}", f"    | {_sentence(mistake)}"]
        else:
            lines = self._frame(mistake, place, place.key)
        if mistake.help:
            lines.append(f"    help: {mistake.help}")
        return "\n".join(lines)

    def _frame(self, mistake: Mistake, place: Place, key: Span) -> list[str]:
        exact = mistake.path in self.places
        span = key if mistake.at_key or not exact or place.value is None else place.value
        text = self.lines[span.line] if span.line < len(self.lines) else ""
        length = max(1, min(span.length, FRAME_WIDTH - span.column))
        return [
            f"  --> {self.name}:{key.line + 1}:{key.column + 1}",
            f"{span.line + 1:>3} | {text[:FRAME_WIDTH]}",
            f"    | {' ' * min(span.column, FRAME_WIDTH)}{'^' * length} {_sentence(mistake)}",
        ]


def _sentence(mistake: Mistake) -> str:
    """Mistakes at a key already name it where they need to; the others begin with the key's name."""
    if mistake.at_key:
        return mistake.message
    colon = ":" if mistake.message.startswith(("'", "no ")) else ""
    return f"{mistake.name}{colon} {mistake.message}".strip()

"""The generated parts of the README: ``python -m tests.readme`` writes them, ``test_readme.py`` keeps them current."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from lora_cli.recipe.document import key_table

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
# From the top floor down, as a recipe walks.
ORDER = (
    "cli.py",
    "door.py",
    "__main__.py",
    "commands",
    "report",
    "training",
    "tasks",
    "fusion",
    "data",
    "models.py",
    "adapters",
    "hub.py",
    "weights.py",
    "ops",
    "recipe",
    "tensorfile.py",
    "storage.py",
    "distributed.py",
    "launch.py",
    "device.py",
    "seeds.py",
    "errors.py",
)


def tree() -> str:
    """The package's files, each with the first line of its docstring."""
    lines = ["lora_cli/"]
    for name in ORDER:
        path = ROOT / "lora_cli" / name
        if path.is_dir():
            lines.append(f"{name + '/':<24}{first_line(path / '__init__.py')}")
            lines += inside(path, 1)
        else:
            lines.append(f"{name:<24}{first_line(path)}")
    return "```\n" + "\n".join(lines) + "\n```"


def inside(folder: Path, depth: int) -> list[str]:
    """A line for each file, and for each folder with its files below it."""
    lines, indent = [], "  " * depth
    for path in sorted(folder.iterdir()):
        if (path / "__init__.py").is_file():
            lines += [f"{indent + path.name + '/':<24}{first_line(path / '__init__.py')}", *inside(path, depth + 1)]
        elif path.suffix == ".py" and path.name != "__init__.py":
            lines.append(f"{indent + path.name:<24}{first_line(path)}")
    return lines


def first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0].replace("`", "")


def current(text: str) -> str:
    """The README with its generated parts as they should be."""
    return with_parts(text, {"keys": key_table(), "tree": tree()})


def with_parts(text: str, parts: dict[str, str]) -> str:
    """The text with these parts between their marks."""
    for name, part in parts.items():
        pattern = rf"<!-- {name} -->.*<!-- /{name} -->"
        replacement = f"<!-- {name} -->\n{part}\n<!-- /{name} -->"
        text = re.sub(pattern, lambda _, new=replacement: new, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    README.write_text(current(README.read_text(encoding="utf-8")), encoding="utf-8")

"""The house: imports go downward, files and functions stay small, nothing dangerous, no dead key."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from lora_cli.recipe.messages import all_keys, section_keys

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lora_cli"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 400, 70

# A module imports from its own room, and from rooms on lower floors.
FLOORS = [
    ["errors"],
    ["seeds", "device", "storage", "recipe", "ops", "launch"],
    ["tensorfile", "hub", "distributed"],
    ["weights"],
    ["models", "adapters"],
    ["data"],
    ["fusion"],
    ["tasks"],
    ["training"],
    ["commands"],
    ["report"],
    ["door"],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room(path: Path) -> str:
    """The package or module directly below lora_cli that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(node: ast.AST) -> Iterator[str]:
    """Every module of this package that is imported at run time, at the top or inside a function."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name.startswith("lora_cli"))
        elif isinstance(child, ast.ImportFrom) and (child.module or "").startswith("lora_cli"):
            assert child.level == 0
            known = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in MODULES}
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from (name if name in known else str(child.module) for name in names)
        yield from imports(child)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


GRAPH = {name_of(path): sorted({*imports(tree(path))} - {"lora_cli"}) for path in MODULES}


def test_every_room_stands_on_a_floor():
    assert {room(path) for path in MODULES} - {"__init__"} == set(FLOOR)


def test_imports_go_down_or_stay_in_their_room():
    upward = [
        f"{name} imports {imported}"
        for name, found in GRAPH.items()
        for imported in found
        if name != "lora_cli"
        and (here := name.split(".")[1]) != (there := imported.split(".")[1])
        and FLOOR[there] >= FLOOR[here]
    ]
    assert upward == []


def test_no_modules_import_one_another_in_a_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for imported in GRAPH.get(name, []):
                if imported not in (name, name.rpartition(".")[0]):  # a package's own __init__
                    visit(imported, (*path, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


def test_the_graph_is_not_empty():
    """A mistake in reading the imports would make every claim above true."""
    assert "lora_cli.training.run" in GRAPH["lora_cli.commands.train"]
    assert "lora_cli.commands.train" in GRAPH["lora_cli.cli"], "an import inside a function"
    assert "lora_cli.recipe.source" not in GRAPH["lora_cli.errors"], "an import for types only"


def test_only_the_report_and_the_door_know_rich():
    knowing = {room(path) for path in MODULES for module in foreign_imports(path) if module == "rich"}
    assert knowing <= {"report", "cli"}


def foreign_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_every_foreign_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[><=\[]", name)[0].lower() for name in project["dependencies"]}
    aliases = {"yaml": "pyyaml", "pydantic_core": "pydantic"}
    known = {*sys.stdlib_module_names, "lora_cli"}
    used = {aliases.get(name, name) for path in MODULES for name in foreign_imports(path) - known}
    assert used <= declared
    unused = declared - used - {"jinja2"}  # read by transformers' chat templates
    assert not unused


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_and_its_functions_stay_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION, node.name


def test_most_functions_are_short():
    lengths = sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for path in MODULES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef)
    )
    assert lengths[len(lengths) // 2] <= 13
    assert lengths[int(0.9 * len(lengths))] <= 45


def called(node: ast.Call) -> str:
    """``torch.load(...)`` is 'torch.load', ``eval(...)`` is 'eval'."""
    parts: list[str] = []
    function: ast.expr = node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if isinstance(function, ast.Name):
        parts.append(function.id)
    return ".".join(reversed(parts))


FORBIDDEN_CALLS = {"torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "eval", "exec", "os.system", "os.popen"}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "subprocess"}


def dangers(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            if called(node) in FORBIDDEN_CALLS:
                found.append(called(node))
            if any(keyword.arg == "shell" for keyword in node.keywords):
                found.append("shell=")
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module in FORBIDDEN_MODULES:
            found.append(node.module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_no_shell_no_eval(path):
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(x)",
        "import pickle",
        "from pickle import loads",
        "run(x, shell=True)",
        "yaml.load(x)",
        "value = eval(x)",
    ],
)
def test_the_search_for_dangers_finds_them(source):
    assert dangers(source)


def test_model_eval_is_no_danger():
    assert dangers("model.eval()") == []


@cache
def reads(path: Path) -> set[tuple[str, str]]:
    """(owner, attribute) of every ``owner.attribute`` and ``getattr(owner, "attribute")``; owner is the last name."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            found.add((last_name(node.value), node.attr))
        if isinstance(node, ast.Call) and called(node) == "getattr" and isinstance(node.args[1], ast.Constant):
            found.add((last_name(node.args[0]), str(node.args[1].value)))
    return found


def last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


OWNERS = {  # the names under which a section travels
    "": {"recipe"},
    "model": {"model", "section"},
    "dataset": {"dataset", "section", "data"},
    "lora": {"lora"},
    "lora.eva_config": {"config"},
    "lora.lora_ga_config": {"lora_ga_config"},
    "lora.loftq_config": {"config", "loftq_config"},
    "training": {"training"},
}
BY_TABLE = {"lora.rank_pattern": "targets.py", "lora.alpha_pattern": "targets.py"}  # getattr(self.lora, key)


@pytest.mark.parametrize("key", all_keys())
def test_every_key_is_read_somewhere(key):
    """A key that is validated and then read by nothing is a lie."""
    section, _, name = key.rpartition(".")
    if section_keys(tuple(key.split("."))):
        return  # its own keys are asked for one by one
    outside = [path for path in MODULES if room(path) != "recipe"]
    readers = [path for path in outside if any(o in OWNERS[section] and a == name for o, a in reads(path))]
    if key in BY_TABLE:
        assert f'"{name}"' in next(p for p in outside if p.name == BY_TABLE[key]).read_text(encoding="utf-8")
    else:
        assert readers, f"{key} is read by nothing outside of recipe/"

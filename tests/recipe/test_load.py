"""From a file and arguments to a recipe, or to one clear message: never to a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.errors import LoraError, RecipeError, UsageError
from lora_cli.recipe import load_recipe

START = "model: m\ndataset: d.jsonl\noutput_dir: o\n"
FUZZ = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@pytest.fixture
def start(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(START)
    return path


# --- what the command line shows


def test_the_error_to_aim_at(lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """DESIGN.md, section 2.2, character by character."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(
        "model: m\n"
        "dataset:\n"
        "  path: rows.jsonl\n"
        "\n"
        "lora:\n"
        "  r: -3\n"
        "\n"
        "training:\n"
        "  learning_rate: 2e-4\n"
        "  num_epoch: 3\n"
        "output_dir: runs/x\n"
    )
    result = lora("train", "recipe.yaml")
    assert result.code == 2
    assert result.out == ""
    assert result.err == (
        "error: recipe.yaml has 2 mistakes\n"
        "  --> recipe.yaml:6:3\n"
        "  6 |   r: -3\n"
        "    |      ^^ lora.r must be 1 or more\n"
        "  --> recipe.yaml:10:3\n"
        " 10 |   num_epoch: 3\n"
        "    |   ^^^^^^^^^ unknown key in training\n"
        "    help: did you mean num_train_epochs?\n"
    )


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a recipe: it should hold keys and values"),
    "only a comment": (b"# nothing\n", "is not a recipe: it should hold keys and values"),
    "a list": (b"- a\n- b\n", "is not a recipe: it should hold keys and values"),
    "a text": (b"hello\n", "is not a recipe: it should hold keys and values"),
    "not UTF-8": (START.encode() + b"task: \xff\n", "is not UTF-8 text: line 4 holds the byte 0xff"),
    "UTF-16": (START.encode("utf-16"), "is not UTF-8 text: line 1 holds the byte 0xff"),
    "a NUL": (START.encode() + b"a: \0\n", ":4:4\n  4 | a: \0\n    |    ^ this is not YAML: the character U+0000"),
    "tabs": (b"lora:\n\tr: 3\n", ":2:1\n  2 | \tr: 3\n    | ^ this is not YAML: while scanning for the next token"),
    "a key twice": (
        START.encode() + b"model: x\n",
        ":4:1\n  4 | model: x\n    | ^^^^^ model is given twice (first on line 1)",
    ),
    "unknown key": (START.encode() + b"lora: {rnk: 3}\n", "^^^ unknown key in lora\n    help: did you mean "),
    "infinite": (START.encode() + b"lora: {lora_alpha: .inf}\n", "lora.lora_alpha must be a finite number, not .inf"),
    "not a number": (
        START.encode() + b"lora: {lora_alpha: .nan}\n",
        "lora.lora_alpha must be a finite number, not .nan",
    ),
    "too large": (START.encode() + b"training: {learning_rate: 1e400}\n", "must be a finite number, not 1e400"),
    "a date": (b"model: 2001-99-99\ndataset: d\noutput_dir: o\nx: 1\n", "unknown key"),
    "a tag": (START.encode() + b"task: !!python/name:os.system\n", "a recipe is data and knows no tags"),
    "an alias of itself": (START.encode() + b"lora: &a {r: *a}\n", "lora is nested deeper than 20 levels"),
    "deep": (START.encode() + b"lora: " + b"[" * 500 + b"]" * 500 + b"\n", "is nested deeper than 20 levels"),
    "very deep": (b"[" * 100_000, "is nested deeper than 20 levels"),
    "not closed": (START.encode() + b"lora: {r: 3\n", "this is not YAML: while parsing a flow mapping"),
    "two documents": (START.encode() + b"---\n" + START.encode(), "expected a single document"),
    "a bad escape": (START.encode() + b'task: "\\UFFFFFFFF"\n', "this is not YAML"),
    "half a character": (START.encode() + b'task: "\\ud83d"\n', "task holds an escape that is no character"),
    "large": (b"# " + b"x" * 1_000_000, "is larger than 1000000 bytes: is this a recipe?"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_recipe_is_one_clear_message(kind: str, lora, tmp_path: Path):
    raw, words = BROKEN[kind]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(raw)
    result = lora("check", path)
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert words in result.err
    assert "Traceback" not in result.err
    assert "bug" not in result.err
    assert len(result.err) < 1200


def test_the_same_message_as_json(lora, tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(START + "lora: {r: 0}\n")
    result = lora("check", path, "--json")
    assert result.code == 2
    assert result.json["error"]["exit_code"] == 2
    assert result.json["error"]["kind"] == "RecipeError"
    assert "lora.r must be 1 or more" in result.json["error"]["message"]


def test_files_that_are_not_there(lora, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(START)
    for name, words in [
        (tmp_path, f"{tmp_path} is a folder; a recipe is a YAML file"),
        (
            tmp_path / "recipe.yml",
            f"there is no recipe {tmp_path}/recipe.yml\n    help: did you mean {tmp_path}/recipe.yaml?",
        ),
        (tmp_path / "none" / "a.yaml", f"there is no folder {tmp_path}/none either"),
        (tmp_path / "recipe.yaml" / "a.yaml", "cannot read"),
        (tmp_path / ("x" * 300), "cannot read"),
        (tmp_path / "quite-another-thing", f"there is no recipe {tmp_path}/quite-another-thing\n"),
    ]:
        result = lora("check", name)
        assert result.code == 2
        assert words in result.err


# --- what is taken


def test_scalars_in_a_recipe(start: Path):
    start.write_text(START + "training: {learning_rate: 2e-4, adam_epsilon: 1e-4}\nlora: {r: 010}\n")
    recipe = load_recipe(start).recipe
    assert (recipe.training.learning_rate, recipe.training.adam_epsilon, recipe.lora.r) == (2e-4, 1e-4, 10)
    start.write_text("model: no\ndataset: 'yes'\noutput_dir: on\n")
    assert load_recipe(start).recipe.model.path == "no"


def test_a_byte_order_mark_is_no_part_of_the_first_key(start: Path):
    start.write_bytes(b"\xef\xbb\xbf" + START.encode())
    loaded = load_recipe(start)
    assert loaded.recipe.model.path == "m"
    assert loaded.text == START


def test_anchors_and_aliases(start: Path):
    start.write_text(START + "lora: {target_modules: &t [q_proj], exclude_modules: *t}\n")
    assert load_recipe(start).recipe.lora.exclude_modules == ["q_proj"]


def test_shorthands(start: Path):
    start.write_text("model: m\ndataset: [a, b]\noutput_dir: o\n")
    loaded = load_recipe(start)
    assert loaded.recipe.dataset.path == ["a", "b"]
    assert loaded.text == start.read_text()
    assert loaded.source.place(("dataset", "path")).key.line == 1


def test_mistakes_of_file_and_arguments_are_told_together(start: Path):
    start.write_text(START + "lora: {r: 0}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(start, ["training.seed=-1", "training.zzz=1"])
    assert [m.name for m in caught.value.mistakes] == ["lora.r", "training.seed", "training.zzz"]


# --- KEY=VALUE


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["training.learning_rate=1e-4"], ("training", "learning_rate"), 1e-4),
        (["lora.r=010"], ("lora", "r"), 10),
        (["output_dir=no"], ("output_dir",), "no"),
        (["output_dir=a=b"], ("output_dir",), "a=b"),
        (["training.max_grad_norm=null"], ("training", "max_grad_norm"), None),
        (["training.max_grad_norm="], ("training", "max_grad_norm"), None),
        (["lora.target_modules=[q_proj, v_proj]"], ("lora", "target_modules"), ["q_proj", "v_proj"]),
        (["lora.target_modules=re:.*q_proj"], ("lora", "target_modules"), "re:.*q_proj"),
        (["lora.target_modules='*_proj'"], ("lora", "target_modules"), "*_proj"),
        (["dataset.split=train[:10]"], ("dataset", "split"), "train[:10]"),
        (["dataset.columns.prompt=question"], ("dataset", "columns"), {"prompt": "question"}),
        (
            ["dataset.columns={prompt: a}", "dataset.columns.completion=b"],
            ("dataset", "columns"),
            {"prompt": "a", "completion": "b"},
        ),
        (["lora.rank_pattern={self_attn.q_proj: 4}"], ("lora", "rank_pattern"), {"self_attn.q_proj": 4}),
        (["model.dtype=float32"], ("model", "path"), "m"),
        (["model.dtype=float32"], ("model", "dtype"), "float32"),
        (["model=x", "model.dtype=float32"], ("model", "path"), "x"),
        (["model.dtype=float32", "model=x"], ("model", "dtype"), "auto"),
        (["dataset.max_length=9"], ("dataset", "path"), ["d.jsonl"]),
        (["dataset=[a, b]", "dataset.max_length=9"], ("dataset", "path"), ["a", "b"]),
        (["lora.r=4", "lora.r=8"], ("lora", "r"), 8),
        (["lora={r: 4}"], ("lora", "r"), 4),
        (
            ["model.path=null", "model.tokenizer=t", "model.config.model_type=llama", "model.config.rope.a.b=1.5"],
            ("model", "config"),
            {"model_type": "llama", "rope": {"a": {"b": 1.5}}},
        ),
    ],
)
def test_overrides_are_typed_like_the_file(arguments: list[str], key: tuple[str, ...], value: object, start: Path):
    got: object = load_recipe(start, arguments).recipe
    for part in key:
        got = getattr(got, part)
    assert got == value
    assert type(got) is type(value)


def test_an_override_reaches_a_section_that_the_file_left_empty(start: Path):
    start.write_text(START + "lora:\n")
    assert load_recipe(start, ["lora.r=4"]).recipe.lora.r == 4


def test_an_override_can_make_a_whole_recipe(start: Path):
    start.write_text("task: causal_lm\n")
    recipe = load_recipe(start, ["model=m", "dataset.path=d", "output_dir=o"]).recipe
    assert (recipe.model.path, recipe.dataset.path) == ("m", ["d"])


def test_an_override_mends_a_mistake_of_the_file(start: Path):
    start.write_text(START + "lora: {r: 0}\n")
    assert load_recipe(start, ["lora.r=1"]).recipe.lora.r == 1
    start.write_text(START + "lora: {r: 0, rank_pattern: {a: 0}}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(start, ["lora.rank_pattern={b: 0}"])
    assert [m.name for m in caught.value.mistakes] == ["lora.r", "lora.rank_pattern.b"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lora.r=0", "lora.r must be 1 or more"),
        ("lora.r=x", "lora.r must be a whole number, not the text 'x'"),
        ("lora.rk=1", "unknown key in lora\n    help: did you mean r?"),
        ("lor.r=1", "unknown key\n    help: did you mean lora?"),
        ("lora.r=[1", "this is not YAML: while parsing a flow sequence"),
        ("lora.r={a: 1, a: 2}", "a is given twice"),
        ("lora.lora_alpha=.inf", "lora.lora_alpha must be a finite number, not .inf"),
        ("lora.target_modules=*q", "this is not YAML: found undefined alias 'q'\n    help: write a text"),
        ("lora.target_modules=!x q", "lora.target_modules has the tag !x"),
        ("output_dir=a\x07b", "this is not YAML: the character U+0007 is not allowed"),
        ("model=\udcff", "this is not YAML: the character U+DCFF is not allowed"),
        ("output_dir.x=1", "output_dir is not a section"),
        ("model.path.x=1", "model.path is not a section"),
        ("output_dir=", "output_dir must be a text, not empty"),
        ("model=null", "model must be a section with keys, not empty"),
        ("training.report_to=mlflow", "training.report_to must be none, tensorboard, wandb"),
    ],
)
def test_a_mistake_in_an_override_names_the_argument(argument: str, message: str, start: Path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(start, [argument])
    assert f"{start} has 1 mistake\n  --> argument {argument}\n    | {message}" in str(caught.value)


@pytest.mark.parametrize("argument", ["lora.r", "=3", "lora..r=3", ".r=3", "lora.=3", ""])
def test_what_is_no_override(argument: str, start: Path):
    with pytest.raises(UsageError, match="is not KEY=VALUE") as caught:
        load_recipe(start, [argument])
    assert caught.value.help == "write for example training.learning_rate=1e-4"


def test_a_rule_broken_by_an_override_names_it(start: Path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(start, ["training.early_stopping_patience=2"])
    assert "argument training.early_stopping_patience=2\n    | training.early" in str(caught.value)


# --- no text whatever leads to a traceback

WORDS = r"""model dataset lora training output_dir path r : - ? [ ] { } , & * ! | > ' " % @ ` # --- ... ~ null true no 1
1e9 .inf !!int !!binary !!python/object &a *a <<: "\x" "\U00110000" "\ud800" %YAML %TAG 0x1 2001-01-01 é 😀"""
BLANKS = ["\n", "\n  ", " ", "\t", ": ", "- ", "\r\n", "\0", "\ufeff", "\x85"]
PIECES = st.sampled_from([*WORDS.split(), *BLANKS])


def survives(path: Path, raw: bytes, overrides: list[str]) -> None:
    path.write_bytes(raw)
    try:
        load_recipe(path, overrides)
    except LoraError as error:
        told = (error.exit_code, str(error))
    else:
        told = (2, "fine")
    assert told[0] == 2
    assert told[1]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "recipe.yaml"


@FUZZ
@given(text=st.one_of(st.text(), st.lists(PIECES).map("".join), st.binary()))
def test_no_text_is_a_traceback(text: str | bytes, scratch: Path):
    survives(scratch, text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"), [])


@FUZZ
@given(piece=st.lists(PIECES, min_size=1, max_size=6).map("".join), at=st.integers(0, 200), cut=st.integers(0, 8))
def test_no_damage_to_a_good_recipe_is_a_traceback(piece: str, at: int, cut: int, scratch: Path):
    good = START + "lora: {r: 4, target_modules: [q_proj]}\ntraining:\n  learning_rate: 2e-4\n  eval_steps: epoch\n"
    at = at % len(good)
    survives(scratch, (good[:at] + piece + good[at + cut :]).encode("utf-8", "surrogatepass"), [])


@FUZZ
@given(
    key=st.sampled_from(["model", "model.path", "dataset.columns", "lora.rank_pattern", "lora.r.x"]),
    value=st.one_of(st.text(), st.lists(PIECES).map("".join)),
)
def test_no_override_is_a_traceback(key: str, value: str, scratch: Path):
    survives(scratch, START.encode(), [f"{key}={value}"])

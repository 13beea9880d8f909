"""`training.cache_frozen_layers` from the recipe to the adapter: the same run, with less to compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_cli.commands import caching
from lora_cli.commands import train as train_command
from lora_cli.commands.train import Outcome, train
from lora_cli.fusion.layers import layer_list
from lora_cli.recipe import load_recipe
from lora_cli.report.training import Silence
from tests.conftest import labelled_rows, write_jsonl

KEY = "training.cache_frozen_layers"
TOP = {  # four layers, of which the last is adapted; three epochs of five steps
    "lora.layers_to_transform": [3],
    "lora.lora_dropout": 0.2,
    "dataset.eval_size": 4,
    "training.max_steps": 15,
    "training.save_steps": 4,
    "training.eval_steps": 4,
}


class Watcher(Silence):
    """Counts the forwards of each layer up to every step."""

    def __init__(self, at: dict[int, Callable[[], None]] | None = None) -> None:
        self.at = at or {}
        self.calls: list[int] = [0] * 4
        self.after: dict[int, list[int]] = {}

    def watch(self, model: Any) -> Any:
        layers = layer_list(model)
        assert layers is not None
        for number, layer in enumerate(layers):
            *_, norm = (  # the last one: what comes before attention runs twice where a layer ends early
                module for module in layer.modules() if isinstance(module, nn.LayerNorm) or "Norm" in str(type(module))
            )
            norm.register_forward_hook(self._counting(number))
        return model

    def _counting(self, number: int) -> Callable[..., None]:
        def count(*_: object) -> None:
            self.calls[number] += 1

        return count

    def step(self, step, state) -> None:
        self.after[step.number] = list(self.calls)
        self.at.get(step.number, lambda: None)()


class Killed(Exception):
    pass


def kill() -> None:
    raise Killed


@pytest.fixture
def go(recipe, tmp_path, model_folder, monkeypatch) -> Callable[..., Outcome]:
    """``go("name", **changes)`` trains into a folder of that name."""

    def run(name: str, watcher: Watcher | None = None, **changes: Any) -> Outcome:
        watcher = watcher or Watcher()
        build = train_command.build_model
        model = {"path": str(model_folder("llama", num_hidden_layers=4)), "dtype": "float32"}
        values = {"model": model, "output_dir": str(tmp_path / name)} | TOP | changes
        with monkeypatch.context() as patch:
            patch.setattr(train_command, "build_model", lambda *args, **kw: watcher.watch(build(*args, **kw)))
            return train(load_recipe(recipe(name=f"{name}.yaml", **values)), watcher)

    return run


def column(outcome: Outcome, name: str) -> list[float]:
    return [line[name] for line in outcome.lines if name in line]


def weights(outcome: Outcome) -> dict[str, Tensor]:
    return load_file(outcome.output.root / "adapter" / "adapter_model.safetensors")


def adapter_bytes(outcome: Outcome) -> bytes:
    return (outcome.output.root / "adapter" / "adapter_model.safetensors").read_bytes()


def assert_the_same(ours: Outcome, theirs: Outcome) -> None:
    for name in ("loss", "eval_loss", "grad_norm"):
        assert column(ours, name) == pytest.approx(column(theirs, name), rel=1e-6 if name != "grad_norm" else 1e-5)
    reference = weights(theirs)
    for name, tensor in weights(ours).items():
        assert float((tensor - reference[name]).norm() / reference[name].norm()) < 1e-5, name


@pytest.mark.parametrize(
    "around",
    [
        {},
        {"training.gradient_checkpointing": True},
        {"training.gradient_accumulation_steps": 2, "training.per_device_train_batch_size": 2},
        # One gradient of these 5,000 is all rounding, of which AdamW would make a whole step with an epsilon of 1e-8.
        {"model.attn_implementation": "sdpa", "training.adam_epsilon": 1e-5},
    ],
    ids=["end to end", "recomputed", "in micro-batches", "padded"],
)
def test_the_run_is_the_same_with_and_without(go, around):
    plain, memory, disk = (go(where, **around | {KEY: where}) for where in ("none", "memory", "disk"))
    assert_the_same(memory, plain)
    assert adapter_bytes(memory) == adapter_bytes(disk)
    assert column(memory, "loss") == column(disk, "loss")


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_the_lower_layers_are_not_run_once_every_row_was_seen(go, where):
    watcher, without = Watcher(), Watcher()
    go("with", watcher, **{KEY: where})
    go("without", without)
    first_epoch, last = watcher.after[5], watcher.after[15]
    assert last[:3] == first_epoch[:3], "none of the lower three, in steps 6 to 15 and their evaluations"
    assert last[3] - first_epoch[3] == 10 + 2, "the upper one in every step and evaluation"
    assert without.after[15][0] - without.after[5][0] == 10 + 2


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("step", [2, 7])
def test_a_resumed_run_ends_in_the_bytes_of_one_that_was_not_stopped(go, where, step):
    """Its cache is made anew, by rows that come in another order."""
    straight = go("straight", **{KEY: where})
    with pytest.raises(Killed):
        go("killed", Watcher({step: kill}), **{KEY: where})
    resumed = go("killed", **{KEY: where})
    assert adapter_bytes(resumed) == adapter_bytes(straight)
    assert column(resumed, "loss") == column(straight, "loss")


def test_it_may_be_switched_on_or_off_on_the_way(go):
    straight = go("straight")
    for before, after in [("none", "disk"), ("memory", "none")]:
        with pytest.raises(Killed):
            go(f"{before}-{after}", Watcher({6: kill}), **{KEY: before})
        assert_the_same(go(f"{before}-{after}", **{KEY: after}), straight)


def test_nothing_is_left_in_the_folder(go):
    names = {name: {p.name for p in go(name, **{KEY: name}).output.root.iterdir()} for name in ("none", "disk")}
    assert names["none"] == names["disk"]


def test_a_classifier_s_head_alone_is_the_best_case(go, model_folder, tmp_path):
    rows = str(write_jsonl(tmp_path / "labelled.jsonl", labelled_rows(24)))
    model = {"path": str(model_folder("llama", "sequence_classification", num_hidden_layers=4)), "dtype": "float32"}
    around = {
        "method": "head",
        "task": "sequence_classification",
        "model": model,
        "dataset": {"path": rows, "eval_size": 4},
        "lora": {},
    }
    nothing = {"lora.layers_to_transform": None, "lora.lora_dropout": 0.0}
    watcher = Watcher()
    plain = go("plain", **around | nothing)
    ours = go("cached", watcher, **around | nothing | {KEY: "memory"})
    assert column(ours, "loss") == pytest.approx(column(plain, "loss"), rel=1e-6)
    assert watcher.after[15] == watcher.after[5], "no layer at all"


# --- what is said and refused before a weight is read --------------------------------------------------------


@pytest.fixture
def deep(recipe, model_folder) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        return recipe(**{"model": {"path": str(model_folder("llama", num_hidden_layers=4))}} | TOP | changes)

    return write


def test_a_check_says_what_it_will_need(deep, lora):
    plain, ours = (lora("check", deep(), f"{KEY}={where}", "--json").json for where in ("none", "disk"))
    tokens = plain["train"]["tokens"] + plain["eval"]["tokens"]
    size = tokens * 32 * {"float32": 4, "bfloat16": 2}[ours["dtype"]]
    assert 0 < ours["disk_bytes"] - plain["disk_bytes"] <= size, "a row that comes twice is kept once"
    (note,) = set(ours["notes"]) - set(plain["notes"])
    assert note.startswith("the lower 3 of 4 layers run once a row; what they give takes 0.")
    assert note.endswith("MB (disk)")


def test_a_single_epoch_without_evaluation_is_told_that_it_gains_nothing(deep, lora):
    path = deep(**{"dataset.eval_size": 0, "training.max_steps": None, "training.num_train_epochs": 1})
    assert "a single epoch visits no row twice" in lora("check", path, f"{KEY}=memory").out
    assert "visits no row twice" not in lora("check", path, f"{KEY}=memory", "training.num_train_epochs=2").out


@pytest.mark.parametrize(
    ("where", "function", "end"),
    [
        ("memory", "available_bytes", "of memory are free beside the model"),
        ("disk", "free_bytes", "of disk are free in"),
    ],
)
@pytest.mark.parametrize("command", ["check", "train"])
def test_too_little_room_is_refused_with_the_figures(deep, lora, monkeypatch, where, function, end, command):
    monkeypatch.setattr(caching, function, lambda *path: 1_000)
    result = lora(command, deep(), f"{KEY}={where}", "model.dtype=float32")
    assert result.code == 2
    assert f"{KEY} does not fit: the states of" in result.err
    assert end in " ".join(result.err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lora.layers_to_transform=null"], "has nothing to skip: layer 0 is trained"),
        (
            ["lora.modules_to_save=[model.norm]", "lora.layers_to_transform=[0]"],
            "has nothing to skip: layer 0 is trained",
        ),
        (["method=full", "lora={}"], "has nothing to skip: model.embed_tokens is trained"),
    ],
)
def test_recipes_with_nothing_to_skip_are_refused(deep, lora, arguments, message):
    result = lora("check", deep(), f"{KEY}=memory", *arguments)
    assert result.code == 2
    assert f"--> argument {KEY}=memory" in result.err
    assert message in result.err


def test_a_base_with_dropout_is_refused_by_its_name(recipe, lora, model_folder):
    path = recipe(model=str(model_folder("gpt2", embd_pdrop=0.1)), **{"lora.layers_to_transform": [1], KEY: "disk"})
    result = lora("train", path)
    assert result.code == 2
    assert "transformer.drop.p = 0.1 makes the frozen layers' states random" in result.err

"""`per_device_train_batch_size: auto`: what fits is taken, and the run is that of the same size written down."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_cli.commands import autosize
from lora_cli.commands import memory as memory_module
from lora_cli.commands import train as train_command
from lora_cli.commands.autosize import Choice, agreed, cut, planned, sizes_of
from lora_cli.commands.memory import MemoryPlanner
from lora_cli.commands.plan import make_plan
from lora_cli.data.batches import StepPlan
from lora_cli.data.encoding import Example
from lora_cli.distributed import World
from lora_cli.errors import OutOfMemoryError
from lora_cli.ops import products
from lora_cli.recipe import load_recipe
from lora_cli.report.training import Silence

AUTO = {"training.per_device_train_batch_size": "auto", "training.gradient_accumulation_steps": 2}


def digest(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(1, [1]), (7, [7, 4, 3, 2, 1]), (8, [8, 4, 3, 2, 1]), (12, [12, 6, 4, 3, 2, 1]), (13, [13, 7, 5, 4, 3, 2, 1])],
)
def test_a_step_is_cut_into_parts_as_equal_as_can_be(rows, sizes):
    assert sizes_of(rows) == sizes
    for processes in (1, 3):
        steps = StepPlan(1000, rows, 1, 0, num_processes=processes)
        examples = [example(length) for length in range(2, 1002)]
        for size in sizes:
            found = cut(steps, size)
            assert found.rows_per_step == steps.rows_per_step
            for rank in range(processes):
                batches = [len(batch) for batch in found.micro_batches(examples, 0, World(rank, processes))]
                assert sum(batches) == rows
                assert len(batches) == found.accumulation
                assert max(batches) == size


def example(length: int) -> Example:
    return Example(np.ones(length, dtype=np.int32), np.arange(length) > 0, "here", None)


def test_the_step_is_the_default_one(recipe):
    plan = make_plan(load_recipe(recipe(**AUTO)))
    assert plan.steps.rows_per_step == 8
    assert (
        make_plan(load_recipe(recipe(**{**AUTO, "training.per_device_train_batch_size": 4}))).steps.rows_per_step == 8
    )


def test_the_plan_leaves_out_what_cannot_fit(recipe):
    planner = MemoryPlanner(make_plan(load_recipe(recipe(**AUTO))))
    assert [steps.micro_batch_size for steps, _ in planned(planner)] == [8, 4, 2, 1]
    for size, expected in [(4, [4, 2, 1]), (3, [3, 1])]:
        planner.limit = int(planner.memory(cut(planner.plan.steps, size)).total / (1 - autosize.MARGIN)) + 1
        assert [steps.micro_batch_size for steps, _ in planned(planner)] == expected, "the largest, then halves"
    planner.limit = 1
    assert [steps.micro_batch_size for steps, _ in planned(planner)] == [1]
    planner.limit = None
    assert [steps.micro_batch_size for steps, _ in planned(planner, at_most=4)] == [4, 2, 1], "a resumed run's"


def test_processes_of_a_machine_share_its_memory(recipe, monkeypatch):
    monkeypatch.setattr(memory_module, "available_bytes", lambda device: 12 * 10**9)
    plan = make_plan(load_recipe(recipe(**AUTO)))
    alone, of_four = (MemoryPlanner(plan, sharing=number, running=number) for number in (1, 4))
    base = sum(p.nbytes for p in of_four.model.parameters() if not p.requires_grad)  # its pages are the files' own
    assert alone.limit - alone.process == 12 * 10**9
    assert of_four.limit - of_four.process == (12 * 10**9 + 3 * base) // 4
    check = MemoryPlanner(plan, sharing=4)
    assert check.limit == (12 * 10**9 + check.process + 3 * base) // 4, "the other three still have to begin"
    copied = MemoryPlanner(make_plan(load_recipe(recipe(**AUTO), ["model.dtype=bfloat16"])), sharing=4, running=4)
    assert copied.limit - copied.process == 3 * 10**9, "of another type than the files each has a copy"


class Others:
    """Two more processes, which have chosen already."""

    def __init__(self, *choices: list[int]) -> None:
        self.choices = choices

    def gather(self, value: list[int]) -> list[list[int]]:
        return [value, *self.choices]


def test_all_processes_take_the_smallest_choice_and_tell_what_it_takes():
    steps = StepPlan(100, 7, 1, 0, num_processes=3)
    mine = Choice(cut(steps, 7), 900, 1000)
    for choices, expected in [(([7, 50, 1000], [4, 200, 800]), (4, 600, 800)), (([7, 50, 1000],), (7, 950, 1000))]:
        found = agreed(mine, Others(*choices))
        assert (found.steps.micro_batch_size, found.peak, found.limit) == expected
        assert found.steps.rows_per_step == 21
        assert found.steps.accumulation == -(-7 // expected[0])


def test_a_trial_that_takes_more_than_there_is_is_followed_by_a_smaller_one(recipe, lora, monkeypatch):
    """Measured, not only survived; with the moments of the first update, and without what an earlier trial freed."""
    limit, moments, held = 10 * 10**9, 8 * 3712, [0]
    most = int((1 - autosize.MARGIN / 2) * limit)
    compute = autosize.accumulate_gradients

    def takes(each: int):
        def step(network, task, batches, device):
            held[0] += each * batches[0].num_rows
            return compute(network, task, batches, device)

        return step

    monkeypatch.setattr(memory_module, "available_bytes", lambda device: limit)
    monkeypatch.setattr(memory_module, "process_bytes", lambda: 0)
    monkeypatch.setattr(autosize, "process_bytes", lambda: held[0])
    monkeypatch.setattr(autosize, "give_back_freed_memory", lambda: held.clear() or held.append(0))
    room = most - moments
    for each, chosen, note in [
        (room // 8, 8, False),
        (room // 8 + 1, 4, False),
        (room // 2 + 1, 1, False),
        (limit + 1, 1, True),
    ]:
        monkeypatch.setattr(autosize, "accumulate_gradients", takes(each))
        out = lora("train", recipe(**AUTO), "--fresh").out
        assert f"micro-batch  {chosen} row" in out
        assert ("that is more memory than there is" in out) is note


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_run_is_bitwise_that_of_the_size_it_chose(recipe, lora, tmp_path, dropout):
    shared = {"lora.lora_dropout": dropout, "dataset.eval_size": 4}
    chosen = lora("train", recipe("a.yaml", **AUTO, **shared, output_dir=str(tmp_path / "a")))
    assert "micro-batch  8 rows (auto: " in chosen.out
    written = {"training.per_device_train_batch_size": 8}
    lora("train", recipe("b.yaml", **written, **shared, output_dir=str(tmp_path / "b")))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    other = {"lora.lora_dropout": 0.5, "dataset.eval_size": 4}
    lora("train", recipe("c.yaml", **written, **other, output_dir=str(tmp_path / "c")))
    assert digest(tmp_path / "c") != digest(tmp_path / "b"), "the control: something would show"


def test_what_does_not_go_through_is_halved(recipe, lora, tmp_path, monkeypatch):
    tried = []
    real = autosize.accumulate_gradients

    def small_memory(network, task, batches, device):
        tried.append(batches[0].num_rows)
        if batches[0].num_rows > 2:
            torch.rand(3)  # a failure in the middle has drawn already
            raise torch.OutOfMemoryError("out of memory: tried to allocate 1 GB")
        return real(network, task, batches, device)

    monkeypatch.setattr(autosize, "accumulate_gradients", small_memory)
    out = lora("train", recipe("a.yaml", **AUTO, **{"lora.lora_dropout": 0.3}, output_dir=str(tmp_path / "a"))).out
    assert tried == [8, 4, 2]
    assert "micro-batch  2 rows (auto: " in out
    written = {"training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 4}
    lora("train", recipe("b.yaml", **written, **{"lora.lora_dropout": 0.3}, output_dir=str(tmp_path / "b")))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_where_nothing_goes_through_the_run_ends_as_out_of_memory(recipe, lora, monkeypatch):
    def no_memory(*args):
        raise torch.OutOfMemoryError("out of memory: tried to allocate 1 GB")

    monkeypatch.setattr(autosize, "accumulate_gradients", no_memory)
    result = lora("train", recipe(**AUTO))
    assert result.code == OutOfMemoryError.exit_code
    assert "gradient_checkpointing" in result.err


def test_a_resumed_run_keeps_its_size_and_its_bytes(recipe, lora, tmp_path):
    whole = recipe("a.yaml", **AUTO, output_dir=str(tmp_path / "a"), **{"training.save_steps": 2})
    assert lora("train", whole).code == 0
    for name in ("adapter", "summary.json", "checkpoints/step-000004"):
        path = tmp_path / "a" / name
        path.rename(tmp_path / f"kept-{path.name}")
    again = lora("train", whole)
    assert "resuming after step 2" in again.out
    assert "micro-batch  8 rows" in again.out
    before = tmp_path / "kept-adapter" / "adapter_model.safetensors"
    assert digest(tmp_path / "a") == hashlib.sha256(before.read_bytes()).hexdigest()


def test_check_tells_what_it_would_take(recipe, lora):
    found = lora("check", recipe(**AUTO), "--json").json
    assert found["rows_per_step"] == 8
    assert found["memory"]["rows"] == 8


def test_the_resolved_recipe_can_be_used_again(recipe, lora, tmp_path):
    assert lora("train", recipe(**AUTO)).code == 0
    resolved = load_recipe(tmp_path / "run" / "resolved.yaml").recipe.training
    assert (resolved.per_device_train_batch_size, resolved.per_device_eval_batch_size) == ("auto", "auto")


def test_a_device_that_does_not_tell_its_memory_is_refused(recipe, lora, monkeypatch):
    monkeypatch.setattr("lora_cli.commands.plan.available_bytes", lambda device: None)
    result = lora("check", recipe(**AUTO))
    assert result.code == 2
    assert "per_device_train_batch_size: auto" in result.err or "per_device_train_batch_size auto" in result.err


@pytest.mark.parametrize("value", ["0", "-1", "most", "1.5", "true", "null"])
def test_anything_else_is_refused(recipe, value):
    with pytest.raises(Exception, match=r"must be a number of rows \(1 or more\) or auto"):
        load_recipe(recipe(), [f"training.per_device_train_batch_size={value}"])


def test_a_cut_is_the_same_step():
    steps = StepPlan(30, 6, 1, seed=3)
    assert steps.rows_of(2) == replace(steps, micro_batch_size=2, accumulation=3).rows_of(2)


@pytest.mark.parametrize("size", ["auto", 4])
def test_who_multiplies_is_settled_before_the_model_is_built_and_put_back_afterwards(size, recipe, monkeypatch):
    """What is computed from the weights at the beginning is the same with a size that is looked for."""
    if torch.cpu._is_amx_tile_supported():
        pytest.skip("with AMX the setting means bfloat16, and is never chosen")
    for name in ("_hampered", "_multiplies_exactly"):
        monkeypatch.setattr(products, name, lambda: True)
    monkeypatch.setattr(products, "LEAST_WEIGHTS", 1)
    build, seen = train_command.build_model, []
    monkeypatch.setattr(
        train_command,
        "build_model",
        lambda *args, **kw: seen.append(products.onednn_multiplies()) or build(*args, **kw),
    )
    path = recipe(**{"training.per_device_train_batch_size": size, "model.dtype": "float32", "training.max_steps": 1})
    train_command.train(load_recipe(path), Silence())
    assert seen == [True]
    assert not products.onednn_multiplies()

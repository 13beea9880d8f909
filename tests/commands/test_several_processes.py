"""`lora train` in two processes, as torchrun starts them: one set of files, one voice, one exit code."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_cli.commands import train as train_command
from lora_cli.commands.plan import make_plan
from lora_cli.distributed import World
from lora_cli.errors import OutOfMemoryError, ToldElsewhere
from lora_cli.recipe import load_recipe
from lora_cli.report.training import Silence
from lora_cli.training.checkpoint import State
from tests.conftest import chat_rows, write_jsonl
from tests.processes import Ranks, finish, printed, start

SLOW = 0.3


def train(folder: Path, path: Path, *arguments: str, count: int = 2) -> list[int]:
    """The exit codes of all processes."""
    folder.mkdir(exist_ok=True)
    if count == 1:
        return [finish(start(folder, "train", path, *arguments))]
    ranks = Ranks(count)
    return [finish(process) for process in ranks.start(folder, "train", path, *arguments)]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def close(one: Path, other: Path, rtol: float) -> None:
    """Losses and figures of both runs."""
    assert [line["step"] for line in lines(one)] == [line["step"] for line in lines(other)]
    for found, expected in zip(lines(one), lines(other), strict=True):
        for name in found.keys() & {"loss", "grad_norm", "eval_loss", "eval_exact_match", "tokens", "epoch"}:
            assert found[name] == pytest.approx(expected[name], rel=rtol), (name, found["step"])


BUSY = {"training.global_batch_size": 8, "training.per_device_train_batch_size": 2, "dataset.eval_size": 5}


@pytest.fixture
def reference(recipe, tmp_path) -> Callable[..., Path]:
    """A run of one process that was never stopped."""

    def make(**changes: Any) -> Path:
        path = recipe("reference.yaml", output_dir=str(tmp_path / "reference"), **changes)
        assert train(tmp_path / "one", path, count=1) == [0]
        return tmp_path / "reference"

    return make


@pytest.mark.parametrize("base", [{}, {"model.quantization": "nf4"}, {"lora.init_lora_weights": "loftq"}], ids=str)
def test_a_global_batch_makes_the_same_run_in_one_process_and_in_two(base, recipe, reference, tmp_path):
    """And one process alone writes and speaks."""
    changes = BUSY | base
    alone = reference(**changes)
    assert train(tmp_path / "two", recipe(**changes)) == [0, 0]
    close(tmp_path / "run", alone, rtol=1e-5)
    for name, tensor in adapter(alone).items():
        torch.testing.assert_close(adapter(tmp_path / "run")[name], tensor, rtol=1e-3, atol=1e-5)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in alone.iterdir()}
    screen = printed(tmp_path / "two" / "rank-0", "stdout")
    assert "step        8 rows (global_batch_size; 2 at most in a micro-batch x 2 processes)" in screen
    assert printed(tmp_path / "two" / "rank-0") == printed(tmp_path / "two" / "rank-1") == ""
    assert printed(tmp_path / "two" / "rank-1", "stdout") == ""


def run_with_peaks(world: World, path: Path) -> None:
    vars(train_command)["peak_memory_bytes"] = lambda device: 10**9 * (1 + world.rank)
    train_command.train(load_recipe(path), Silence(), world=world)


def test_the_peak_of_memory_is_that_of_the_process_that_took_most(recipe, tmp_path):
    path = recipe(**{"training.max_steps": 1})
    assert Ranks(2).call(run_with_peaks, path) == [None, None]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["peak_memory_bytes"], summary["processes"]) == (2 * 10**9, 2)
    assert train(tmp_path / "again", path) == [0, 0]
    screen = printed(tmp_path / "again" / "rank-0", "stdout")
    assert "peak memory 2.0 GB in the largest of 2 processes" in " ".join(screen.split())


def test_auto_in_two_processes_is_the_size_that_both_have_room_for(recipe, tmp_path):
    shared = {"training.gradient_accumulation_steps": 1, "training.max_steps": 3}
    auto = recipe(**shared, **{"training.per_device_train_batch_size": "auto"})
    assert train(tmp_path / "auto", auto) == [0, 0]
    screen = printed(tmp_path / "auto" / "rank-0", "stdout")
    assert "micro-batch  4 rows (auto: " in screen
    written = recipe("written.yaml", output_dir=str(tmp_path / "written"), **shared)
    assert train(tmp_path / "w", written) == [0, 0]
    for name, tensor in adapter(tmp_path / "written").items():
        assert torch.equal(adapter(tmp_path / "run")[name], tensor)


def test_a_finished_run_says_so_once(recipe, tmp_path):
    path = recipe(**{"training.max_steps": 1})
    assert train(tmp_path / "first", path) == [0, 0]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("adapter/*")}
    assert train(tmp_path / "again", path, "--json") == [0, 0]
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("adapter/*")}
    assert json.loads(printed(tmp_path / "again" / "rank-0", "stdout"))["steps"] == 1
    assert printed(tmp_path / "again" / "rank-1", "stdout") == ""


def run_out_of_memory(world: World, path: Path, module: str, name: str, failing: int) -> None:
    def boom(*anything: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    if world.rank == failing:
        setattr(import_module(f"lora_cli.commands.{module}"), name, boom)
    train_command.train(load_recipe(path), Silence(), world=world)


@pytest.mark.parametrize(
    ("module", "name", "failing"),
    [
        ("building", "load_model", 0),
        ("building", "load_model", 1),
        ("building", "begin", 1),
        ("building", "build_network", 0),
        ("train", "cached", 1),
    ],
)
def test_one_process_without_memory_ends_all_within_seconds_wherever_it_happens(module, name, failing, recipe):
    ranks = Ranks(2)
    results = ranks.call(run_out_of_memory, recipe(), module, name, failing, seconds=30)
    assert [type(result) for result in results] == [
        OutOfMemoryError if rank == failing else ToldElsewhere for rank in range(2)
    ]
    assert ranks.codes == [4, 4]


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        path = folder / "metrics.jsonl"
        if path.exists() and any(line["step"] >= step for line in lines(folder)):
            return
        time.sleep(0.02)
    raise AssertionError("no step")


def stop(folder: Path, path: Path, number: int, step: int, rank: int = 1) -> list[int]:
    """Send one process a signal while the step after ``step`` runs. The exit codes of both."""
    folder.mkdir()
    processes = Ranks(2).start(folder, "train", path, pause=SLOW)
    wait_for_step(path.parent / "run", step)
    os.kill(processes[rank].pid, number)
    return [finish(process) for process in processes]


DROPPING = {"lora.lora_dropout": 0.2, "training.max_steps": 6, "dataset.eval_size": 4}


@pytest.mark.parametrize(("number", "code", "strategy"), [(signal.SIGTERM, 143, "ddp"), (signal.SIGUSR1, 138, "fsdp")])
def test_a_signal_to_one_process_stops_both_with_one_checkpoint_and_resuming_is_bit_for_bit(
    recipe, tmp_path, number, code, strategy
):
    changes = DROPPING | {"training.strategy": strategy}
    whole = recipe("whole.yaml", output_dir=str(tmp_path / "whole"), **changes)
    assert train(tmp_path / "w", whole) == [0, 0]
    path = recipe(**changes)
    assert stop(tmp_path / "stopped", path, number, 2) == [code, code]
    saved = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert len(saved) == 1
    step = int(saved[0].removeprefix("step-"))
    assert 2 <= step < 6
    message = f"stopped by {signal.Signals(number).name} after step {step} of 6; everything is saved"
    assert message in printed(tmp_path / "stopped" / "rank-0")
    assert printed(tmp_path / "stopped" / "rank-1") == ""
    assert train(tmp_path / "resumed", path) == [0, 0]
    assert f"resuming after step {step} of 6" in printed(tmp_path / "resumed" / "rank-0", "stdout")
    one, other = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "whole"))
    assert one == other


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_comes_again_and_again_while_the_run_leaves_ends_nothing(recipe, tmp_path, number):
    """As launchers, schedulers and the watch for a lost launcher send it: to one process after the other."""
    processes = Ranks(2).start(tmp_path, "train", recipe(**{"training.max_steps": 4000}))
    wait_for_step(tmp_path / "run", 2)
    while processes[0].is_alive():
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(processes[0].pid, number)
    assert [finish(process) for process in processes] == [128 + number, 128 + number]
    assert "everything is saved" in printed(tmp_path / "rank-0")


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_with_the_same_rows(recipe, reference, tmp_path, first, then):
    """As long as a step has as many rows; without dropout even the same figures come out, but for rounding."""
    changes = BUSY | {"training.max_steps": 6, "training.save_steps": 3}
    alone = reference(**changes)
    path = recipe(**changes)
    folder = tmp_path / "stopped"
    folder.mkdir()
    if first == 2:
        processes = Ranks(2).start(folder, "train", path, pause=SLOW)
    else:
        processes = [start(folder, "train", path, pause=SLOW)]
    wait_for_step(tmp_path / "run", 2)
    os.kill(processes[0].pid, signal.SIGTERM)
    assert {finish(process) for process in processes} == {143}
    assert set(train(tmp_path / "resumed", path, count=then)) == {0}
    close(tmp_path / "run", alone, rtol=1e-4)


def test_other_rows_in_a_step_are_refused_by_name_and_once(recipe, tmp_path):
    path = recipe(**{"training.max_steps": 2})
    assert train(tmp_path / "one", path, count=1) == [0]
    assert train(tmp_path / "two", path) == [2, 2]
    assert "made 4 rows a step when this run began, and makes 8" in printed(tmp_path / "two" / "rank-0")
    assert printed(tmp_path / "two" / "rank-1") == ""


def test_fresh_sets_the_earlier_run_aside_once(recipe, tmp_path):
    path = recipe(**{"training.max_steps": 1})
    assert train(tmp_path / "first", path) == [0, 0]
    assert train(tmp_path / "second", path, "--fresh") == [0, 0]
    assert [p.name for p in (tmp_path / "run").glob("earlier-*")] == ["earlier-001"]


def test_a_random_base_is_written_by_one_and_read_by_both(recipe, model_folder, tmp_path):
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}
    model = {"config": config, "tokenizer": str(model_folder()), "dtype": "float32"}
    path = recipe(model=model, **{"training.max_steps": 2, "training.strategy": "fsdp"})
    assert train(tmp_path / "two", path) == [0, 0], printed(tmp_path / "two" / "rank-0")
    assert (tmp_path / "run" / "base" / "model.safetensors").is_file()


IN_PIECES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"lora.use_dora": True, "lora.init_lora_weights": "pissa"},
    "rows": {"lora.trainable_token_indices": [5, 9]},
    "upper layer, dropout": {"lora.layers_to_transform": [1], "lora.lora_dropout": 0.2},
    "embedding": {"lora.target_modules": ["embed_tokens", "q_proj", "up_proj"]},
    "nf4": {"model.quantization": "nf4"},
    "int8, dora": {"model.quantization": "int8", "lora.use_dora": True},
    "loftq": {"lora.init_lora_weights": "loftq"},
}


@pytest.mark.parametrize("kind", IN_PIECES)
def test_a_base_in_pieces_gives_the_same_adapter(kind, recipe, model_folder, tmp_path):
    base = model_folder("llama", tie_word_embeddings=kind != "embedding")
    changes = BUSY | IN_PIECES[kind] | {"training.max_steps": 4, "training.gradient_checkpointing": True}
    changes |= {"model": {"path": str(base), "dtype": "float32"}}
    whole = recipe("whole.yaml", output_dir=str(tmp_path / "whole"), **changes)
    assert train(tmp_path / "w", whole) == [0, 0]
    assert train(tmp_path / "p", recipe(**changes | {"training.strategy": "fsdp"})) == [0, 0]
    close(tmp_path / "run", tmp_path / "whole", rtol=1e-6)
    for name, tensor in adapter(tmp_path / "whole").items():
        torch.testing.assert_close(adapter(tmp_path / "run")[name], tensor, rtol=0, atol=1e-6)


def test_frozen_layers_that_run_once_a_row_give_the_same_run_in_two_processes(recipe, reference, tmp_path):
    changes = BUSY | {"training.max_steps": 6, "training.cache_frozen_layers": "disk"}
    changes |= {"lora.layers_to_transform": [1]}
    alone = reference(**changes)
    assert train(tmp_path / "two", recipe(**changes)) == [0, 0], printed(tmp_path / "two" / "rank-0")
    close(tmp_path / "run", alone, rtol=1e-5)


def bad_rows(tmp_path: Path) -> str:
    return str(write_jsonl(tmp_path / "bad.jsonl", [*chat_rows(5), {"messages": 3}]))


CASES: dict[str, tuple[Any, int, str]] = {
    "recipe": (lambda tmp_path: {"training.num_epoch": 3, "lora.r": -1}, 2, "has 2 mistakes"),
    "too many processes": (
        lambda tmp_path: {"training.global_batch_size": 1},
        2,
        "training.global_batch_size 1 rows a step leave some of 2 processes without any",
    ),
    "data": (lambda tmp_path: {"dataset.path": bad_rows(tmp_path)}, 6, "bad.jsonl:6"),
    "not finite": (lambda tmp_path: {"training.learning_rate": 1e30, "training.max_steps": 8}, 3, "not finite"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_told_once_with_the_documented_code(recipe, tmp_path, case):
    changes, code, message = CASES[case]
    assert train(tmp_path / "two", recipe(**changes(tmp_path))) == [code, code]
    told = printed(tmp_path / "two" / "rank-0")
    assert message in told
    assert told.count("error:") == 1
    assert printed(tmp_path / "two" / "rank-1") == ""


def test_what_only_the_other_process_finds_wrong_is_told_by_it(recipe, tmp_path):
    """A machine on which the rows are not to be seen: here, a folder of its own to look for them in."""
    path = recipe(**{"dataset.path": "rows.jsonl"})
    ranks, folder = Ranks(2), tmp_path / "two"
    folder.mkdir()
    here = os.getcwd()
    try:
        os.chdir(tmp_path)  # a forked process begins where this one stands
        main = ranks.start_one(0, folder, "train", path)
        os.chdir(folder)
        other = ranks.start_one(1, folder, "train", path)
    finally:
        os.chdir(here)
    assert [finish(main), finish(other)] == [2, 2] or [finish(main), finish(other)] == [6, 6]
    assert "error: process 1 of 2: " in printed(folder / "rank-1")
    assert printed(folder / "rank-0") == ""
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_folder_that_cannot_be_written_ends_both_with_code_5(recipe, tmp_path):
    """Found by the main process alone, in the middle of the run."""
    path = recipe(**{"training.max_steps": 4, "training.save_steps": 2})
    folder = tmp_path / "two"
    folder.mkdir()
    processes = Ranks(2).start(folder, "train", path, pause=SLOW)
    wait_for_step(tmp_path / "run", 1)
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    assert [finish(process) for process in processes] == [5, 5]
    assert printed(folder / "rank-0").count("error:") == 1
    assert printed(folder / "rank-1") == ""


# --- what each draws for itself, and what all have from one -----------------------------------------------------------


def test_no_two_processes_drop_the_same_units_nor_does_a_run_that_goes_on_repeat_itself(recipe):
    plan, draws = make_plan(load_recipe(recipe())), set()
    for step in range(4):
        for rank in range(4):
            train_command.seed_dropout(plan, State(step=step), World(rank, 4))
            draws.add(float(torch.rand(1, dtype=torch.float64)))
    assert len(draws) == 16
    train_command.seed_dropout(plan, State(step=0), World())
    alone = torch.rand(8)
    train_command.seed_dropout(plan, State(step=0), World(0, 2))
    assert torch.equal(torch.rand(8), alone), "the main process goes on as a single one would"


def beginning_of(world: World, path: str) -> list[float]:
    """The values that a process begins with whose own arithmetic is a little off."""
    from lora_cli.commands import building

    begin = building.begin

    def off(model: Any, *anything: Any) -> None:
        begin(model, *anything)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * world.rank)

    loaded = load_recipe(Path(path))
    plan = make_plan(loaded, world=world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "begin", off)
        model = building.build_model(plan, Path(loaded.recipe.model.path), world=world)
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]).tolist()


def test_all_begin_with_the_main_ones_values(recipe):
    path = str(recipe(**{"lora.trainable_token_indices": [5, 9]}))
    first, second = Ranks(2).call(beginning_of, path)
    assert first == second
    assert beginning_of(World(1, 1), path) != first, "the negative control: by itself it is off"

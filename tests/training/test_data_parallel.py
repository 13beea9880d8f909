"""Two processes make the steps of one: equal gradients, losses and figures, whoever has which rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.adapters.injection import packable_modules, quantize
from lora_cli.data.batches import StepPlan, collate
from lora_cli.device import memory_errors
from lora_cli.distributed import ALONE, World
from lora_cli.errors import NonFiniteError, OutOfMemoryError, ToldElsewhere, UsageError
from lora_cli.fusion.layers import repeated_layers
from lora_cli.fusion.network import Network
from lora_cli.fusion.proof import build_network
from lora_cli.fusion.recompute import checkpoint_activations
from lora_cli.fusion.sharding import shard_layers
from lora_cli.models import head_modules
from lora_cli.recipe import TrainingSection
from lora_cli.tasks import TASKS, CausalLM
from lora_cli.training.evaluation import evaluate
from lora_cli.training.loop import LoopSettings, train_step, train_steps
from lora_cli.training.optimizer import FlatAdamW
from lora_cli.training.run import check_gradients
from lora_cli.training.signals import StopRequest
from tests.conftest import tiny_model
from tests.processes import Ranks
from tests.training.test_loop import CPU, EXAMPLES, LABELLED, adapted

SETTINGS = LoopSettings(
    learning_rate=0.01, lr_scheduler_type="constant", warmup_steps=0, total_steps=3, max_grad_norm=None, pad_id=0
)
# 7 rows in steps of 4: the second step of an epoch has 3, an odd number for two processes.
ROWS = EXAMPLES[:7]
ONE = StepPlan(7, 1, 4, seed=3)
TWO = StepPlan(7, 1, 2, seed=3, num_processes=2)


def steps_of(world: World, plan: StepPlan, kind: str = "llama", how: str = "") -> dict[str, Any]:
    """Three steps: each one's loss and gradients, and the values at the end."""
    model = adapted(kind)
    if "checkpointed" in how:
        checkpoint_activations(model, "selective" if "selective" in how else True)
    sharded = "sharded" in how and world.size > 1
    if sharded:
        shard_layers(model, CPU)
    network = replace(build_network(model, "causal_lm"), sharded=sharded)
    optimizer = FlatAdamW(model, TrainingSection())
    heard = Deaf(world.rank, world.size) if "deaf" in how else world
    steps = train_steps(network, CausalLM, ROWS, plan, optimizer, SETTINGS, start=0, device=CPU, world=heard)
    seen = [(step.loss, step.num_tokens, optimizer.gradients.tolist()) for step in steps]
    found = {"steps": seen, "values": optimizer.values.tolist(), "forms": network.forms, "held": frozen_bytes(model)}
    return found | {"looks_at": network.layout.looks_at}


def frozen_bytes(model: PreTrainedModel) -> int:
    """What this process holds of the frozen layers."""
    layers = repeated_layers(model).values()
    return sum(parameter_bytes(p) for layer in layers for p in layer.parameters() if not p.requires_grad)


def parameter_bytes(parameter: Any) -> int:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return int(local.untyped_storage().nbytes())


class Deaf(World):
    """A process that never hears of the others' sums."""

    def add(self, tensor: Tensor) -> Tensor:
        return tensor


def relative(found: list[float], expected: list[float]) -> float:
    a, b = torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return steps_of(ALONE, ONE)


def test_two_processes_with_half_the_accumulation_make_the_steps_of_one(alone):
    first, second = Ranks(2).call(steps_of, TWO)
    assert first == second, "bit for bit the same in both"
    for step, expected in zip(first["steps"], alone["steps"], strict=True):
        assert math.isclose(step[0], expected[0], rel_tol=1e-6)
        assert step[1] == expected[1], "tokens"
        assert relative(step[2], expected[2]) < 1e-5, "gradients, at values that differ by a rounding or two"
    assert relative(first["steps"][0][2], alone["steps"][0][2]) < 1e-6, "gradients at the same values"
    assert relative(first["values"], alone["values"]) < 1e-5


def test_without_the_sum_they_would_differ(alone):
    """The negative control: each process's own gradient is not the step's."""
    first, second = Ranks(2).call(steps_of, TWO, "llama", "deaf")
    assert relative(first["steps"][0][2], alone["steps"][0][2]) > 0.1
    assert relative(first["steps"][0][2], second["steps"][0][2]) > 0.1


@pytest.mark.parametrize("rows_per_step", [2, 3, 8])
def test_a_global_batch_is_the_same_rows_for_any_number_of_processes(rows_per_step):
    plans = [StepPlan(8, 2, 1, 5, num_processes=n, global_batch_size=rows_per_step) for n in (1, 2, 3)]
    for step in range(6):
        rows = [
            sorted(
                row.where
                for rank in range(plan.num_processes)
                for batch in plan.micro_batches(EXAMPLES, step, World(rank, plan.num_processes))
                for row in batch
            )
            for plan in plans
        ]
        assert rows[0] == rows[1] == rows[2]


def test_rows_per_step_count_all_processes():
    assert StepPlan(100, 4, 2, 0, num_processes=3).rows_per_step == 24


# --- sharded ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "how"),
    [("llama", "sharded"), ("gpt2", "sharded checkpointed"), ("llama", "sharded selective checkpointed")],
)
def test_a_base_in_pieces_gives_the_same_steps(kind, how):
    """And is one: each process holds about half of the frozen layers. An epoch's last step has 2 rows and 1."""
    whole = Ranks(2).call(steps_of, TWO, kind)[0]
    first, second = Ranks(2).call(steps_of, TWO, kind, how)
    assert first["steps"] == second["steps"]
    for (loss, _, gradient), (expected_loss, _, expected) in zip(first["steps"], whole["steps"], strict=True):
        assert math.isclose(loss, expected_loss, rel_tol=1e-6)
        assert relative(gradient, expected) < 1e-6
    assert relative(first["values"], whole["values"]) < 1e-6
    assert first["forms"] == whole["forms"]
    assert bool(first["forms"]) == (kind == "llama")
    assert first["looks_at"] == whole["looks_at"] == ("targets" if kind == "llama" else None)  # the short last layer
    assert first["held"] + second["held"] < 1.1 * whole["held"]
    assert first["held"] < 0.6 * whole["held"]


def held_of_a_packed_base(world: World) -> int:
    model = tiny_model("llama")
    quantize(model, packable_modules(model, head_modules(model, "causal_lm")), "nf4")
    model.requires_grad_(False)
    if world.size > 1:
        shard_layers(model, CPU)
    return frozen_bytes(model)


def test_a_packed_base_is_cut_up_too():
    first, second = Ranks(2).call(held_of_a_packed_base)
    whole = held_of_a_packed_base(ALONE)
    assert first + second < 1.1 * whole
    assert first < 0.6 * whole


# --- evaluation ---------------------------------------------------------------------------------------------------


def figures_of(world: World, task: str, count: int, stopped_rank: int = -1, sharded: bool = False) -> Any:
    model = adapted("llama", task)
    if sharded:
        shard_layers(model, CPU)
    network = replace(build_network(model, task), sharded=sharded)
    rows = (LABELLED if task == "sequence_classification" else EXAMPLES)[:count]
    return evaluate(
        network,
        TASKS[task],
        rows,
        batch_size=2,
        pad_id=0,
        device=CPU,
        world=world,
        stop=lambda: world.rank == stopped_rank,
    )


def compared(world: World) -> dict[str, Any]:
    """Several evaluations in one pair of processes: starting one costs more than evaluating."""
    found: dict[str, Any] = {
        f"{task} {count}": figures_of(world, task, count) for task in TASKS for count in (1, 2, 6, 8) if task in TASKS
    }
    found["stopped"] = figures_of(world, "causal_lm", 8, stopped_rank=1)
    found["sharded"] = figures_of(world, "causal_lm", 5, sharded=True)
    return found


def test_figures_do_not_depend_on_the_number_of_processes():
    """Not even where there are fewer batches than processes."""
    first, second = Ranks(2).call(compared)
    assert first == second
    for key, found in first.items():
        if key == "stopped":
            assert found is None, "where one is asked to leave, all leave"
            continue
        task, count = ("causal_lm", 5) if key == "sharded" else (key.split()[0], int(key.split()[1]))
        expected = figures_of(ALONE, task, count)
        assert found.keys() == expected.keys()
        assert all(math.isclose(found[name], expected[name], rel_tol=1e-12) for name in found), key


# --- what goes wrong --------------------------------------------------------------------------------------------------


class NanInOneRow(CausalLM):
    @staticmethod
    def loss_sum(network: Network, batch: Any) -> Tensor:
        loss = CausalLM.loss_sum(network, batch)
        return loss * math.nan if "rows.jsonl:8" in batch.where else loss


class NoMemoryForOneRow(CausalLM):
    @staticmethod
    def loss_sum(network: Network, batch: Any) -> Tensor:
        if "rows.jsonl:8" in batch.where:
            raise torch.OutOfMemoryError("out of memory")
        return CausalLM.loss_sum(network, batch)


def one_step(world: World, task: Any, owner: int) -> None:
    """A step whose eighth row is the process ``owner``'s."""
    optimizer = FlatAdamW(model := adapted(), TrainingSection())
    before = optimizer.values.clone()
    share = [collate([row], 0) for row in EXAMPLES[int(world.rank == owner) :: 2]]
    assert any("rows.jsonl:8" in batch.where for batch in share) == (world.rank == owner)
    try:
        with memory_errors("cure"):
            train_step(Network(model), task, share, optimizer, 1.0, CPU, num_targets=100, world=world)
    finally:
        assert torch.equal(optimizer.values, before), "no update was made"


@pytest.mark.parametrize("owner", [0, 1])
def test_a_loss_that_is_not_finite_stops_all_and_the_main_process_names_the_row(owner):
    ranks = Ranks(2)
    main, other = ranks.call(one_step, NanInOneRow, owner)
    assert isinstance(main, NonFiniteError)
    assert "Rows of the step: rows.jsonl:8\n" in str(main)
    assert isinstance(other, ToldElsewhere)
    assert ranks.codes == [3, 3]


def test_memory_that_runs_out_in_one_process_ends_both_with_its_code():
    ranks = Ranks(2)
    main, other = ranks.call(one_step, NoMemoryForOneRow, 1)
    assert isinstance(other, OutOfMemoryError)
    assert str(other.origin) == "process 1 of 2: "
    assert isinstance(main, ToldElsewhere)
    assert ranks.codes == [4, 4]


def asked(world: World) -> list[tuple[int, int | None]]:
    """The second process gets a signal while the second step runs."""
    model = adapted()
    optimizer = FlatAdamW(model, TrainingSection())
    stop = StopRequest(world)
    seen: list[tuple[int, int | None]] = []
    steps = train_steps(
        Network(model), CausalLM, ROWS, TWO, optimizer, SETTINGS, start=0, device=CPU, world=world, stop=stop
    )
    for step in steps:
        seen.append((step.number, stop.signum))
        if step.number == 1 and world.rank == 1:
            stop._note(15, None)
            assert stop.signum is None, "noted here, and not agreed upon yet"
    return seen


def test_a_signal_to_one_process_is_known_to_both_after_the_same_step():
    first, second = Ranks(2).call(asked)
    assert first == second == [(1, None), (2, 15), (3, 15)]


def unreached(world: World) -> None:
    """The first process has rows for one adapter, the second for none at all."""
    optimizer = FlatAdamW(adapted(), TrainingSection())
    names = sorted(name for name in optimizer.never_reached if name.endswith("lora_B"))
    optimizer.never_reached = set(names[:1]) if world.rank == 0 else set(names)
    check_gradients(optimizer, world)


def test_an_adapter_is_idle_only_if_no_process_reaches_it():
    main, other = Ranks(2).call(unreached)
    assert isinstance(main, UsageError)
    assert "1 adapters get no gradient" in main.message
    assert isinstance(other, ToldElsewhere)


def test_the_votes_lie_beside_the_gradients_and_outside_of_their_norm():
    optimizer = FlatAdamW(nn.Linear(2, 1), TrainingSection())
    optimizer.gradients.fill_(1.0)
    norm = optimizer.gradient_norm()
    optimizer.aside.fill_(1000.0)
    assert torch.equal(optimizer.gradient_norm(), norm)
    optimizer.zero_gradients()
    assert not optimizer.exchanged.any()

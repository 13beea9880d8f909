"""The optimizer step: the same gradient however the rows are cut, and as a naive float64 computation finds it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_cli.adapters.initialisation import initialise
from lora_cli.adapters.injection import adapters_of, attach, freeze_base
from lora_cli.adapters.targets import find_targets
from lora_cli.data.batches import PADDED, Layout, StepPlan, collate
from lora_cli.data.encoding import Example
from lora_cli.errors import NonFiniteError, OutOfMemoryError
from lora_cli.fusion.network import Network
from lora_cli.fusion.proof import build_network
from lora_cli.fusion.recompute import checkpoint_activations
from lora_cli.recipe import LoraSection, TrainingSection
from lora_cli.tasks import TASKS, CausalLM, SequenceClassification
from lora_cli.training import loop
from lora_cli.training.loop import LoopSettings, accumulate_gradients, train_step, train_steps
from lora_cli.training.optimizer import FlatAdamW, trained_parameters
from tests.conftest import tiny_model

CPU = torch.device("cpu")
LENGTHS = [(97, 3), (5, 3), (40, 38), (12, 1), (64, 10), (3, 2), (80, 79), (21, 7)]  # (tokens, of them prompt)
CUTS = [8, 4, 2, 1]  # rows in a micro-batch
SETTINGS = LoopSettings(
    learning_rate=0.01, lr_scheduler_type="linear", warmup_steps=2, total_steps=5, max_grad_norm=1.0, pad_id=0
)


def example(index: int, length: int, prompt: int, label: int | None = None) -> Example:
    ids = np.random.default_rng(index).integers(3, 320, length).astype(np.int32)
    supervised = (np.arange(length) >= prompt) & (label is None)
    return Example(ids, supervised, f"rows.jsonl:{index + 1}", label)


EXAMPLES = [example(index, length, prompt) for index, (length, prompt) in enumerate(LENGTHS)]
LABELLED = [example(index, length, 0, label=index % 2) for index, (length, _) in enumerate(LENGTHS)]


def adapted(kind: str = "llama", task: str = "causal_lm", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model with adapters on every layer, whose B is not zero: so A has a gradient too."""
    model = tiny_model(kind, task, **changes).to(dtype)
    lora, saved = LoraSection(r=4), ["score"] if task == "sequence_classification" else []
    attach(model, find_targets(model, lora, saved))
    freeze_base(model, saved)
    initialise(adapters_of(model), LoraSection(), seed=1)
    torch.manual_seed(2)
    for layer in adapters_of(model).values():
        nn.init.normal_(layer.lora_B, std=0.05)
    return model.train()


def cut(examples: list[Example], size: int, layout: Layout = PADDED) -> list[Any]:
    return [collate(examples[start : start + size], 0, layout) for start in range(0, len(examples), size)]


def fast(model: Any, task: str = "causal_lm") -> Network:
    """The model as training runs it: end to end, with fused forms."""
    network = build_network(model, task)
    assert network.end_to_end
    return network


def gradients(network: Any, examples: list[Example], size: int, task: Any = CausalLM) -> dict[str, Tensor]:
    network = network if isinstance(network, Network) else Network(network)
    network.model.zero_grad()
    accumulate_gradients(network, task, cut(examples, size, network.layout), CPU)
    scale = loop.loss_scale(network)
    return {name: p.grad / scale for name, p in trained_parameters(network.model).items() if p.grad is not None}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def difference(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """||ours - reference|| / ||reference||"""
    assert ours.keys() == reference.keys()
    return float((flat(ours) - flat(reference)).norm() / flat(reference).norm())


@pytest.mark.parametrize("way", [Network, fast])
@pytest.mark.parametrize("size", CUTS[1:])
def test_eight_rows_give_the_same_gradient_in_any_number_of_micro_batches(size, way):
    network = way(adapted())
    assert difference(gradients(network, EXAMPLES, size), gradients(network, EXAMPLES, 8)) < 1e-6


@pytest.mark.parametrize("way", [Network, partial(fast, task="sequence_classification")])
@pytest.mark.parametrize("size", CUTS[1:])
def test_eight_classified_rows_give_the_same_gradient_in_any_number_of_micro_batches(size, way):
    network = way(adapted(task="sequence_classification"))
    ours = gradients(network, LABELLED, size, SequenceClassification)
    assert difference(ours, gradients(network, LABELLED, 8, SequenceClassification)) < 1e-6


def test_averaging_the_means_of_micro_batches_would_be_another_gradient():
    """The mistake that other trainers made; these rows tell the two apart."""
    model = adapted()
    means = [gradients(model, EXAMPLES[start : start + 1], 1) for start in range(8)]
    averaged = {name: sum(g[name] for g in means) / 8 for name in means[0]}
    assert difference(averaged, gradients(model, EXAMPLES, 8)) > 0.1


def naive_loss(model: Any, row: Example) -> Tensor:
    """Sum over supervised positions of -log p(token | tokens before), one row, no padding, float64."""
    ids = torch.from_numpy(row.input_ids).long()
    log_p = torch.log(torch.softmax(model(input_ids=ids[None]).logits[0], dim=-1))
    return -sum(log_p[t - 1, ids[t]] for t in range(1, len(ids)) if row.supervised[t])


@pytest.mark.parametrize("way", [Network, fast])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_gradient_is_that_of_a_naive_float64_computation(kind, way):
    ours, model = gradients(way(adapted(kind)), EXAMPLES, 4), adapted(kind, dtype=torch.float64)
    for layer in adapters_of(model).values():
        layer.double()
    targets = sum(int(row.supervised.sum()) for row in EXAMPLES)
    (sum(naive_loss(model, row) for row in EXAMPLES) / targets).backward()
    reference = {name: p.grad for name, p in trained_parameters(model).items()}
    assert difference(ours, reference) < 2e-6


def test_the_micro_batches_losses_add_up_to_the_mean_over_all_targets():
    model = adapted()
    with torch.no_grad():
        expected = float(sum(naive_loss(model, row) for row in EXAMPLES)) / sum(e.num_targets for e in EXAMPLES)
    for size in CUTS:
        losses = accumulate_gradients(Network(model), CausalLM, cut(EXAMPLES, size), CPU)
        assert float(sum(losses)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("way", [Network, fast])
def test_frozen_parameters_never_get_a_gradient_buffer(way):
    model = adapted()
    gradients(way(model), EXAMPLES, 4)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if "lora_" in name
    }


@pytest.mark.parametrize("way", [Network, fast])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_checkpointing_recomputes_with_a_frozen_base_and_gives_the_same_gradient(kind, way):
    network = way(adapted(kind))
    plain = gradients(network, EXAMPLES, 4)
    checkpoint_activations(network.model)
    norm = next(m for name, m in network.model.named_modules() if name.endswith(("input_layernorm", "ln_1")))
    forwards = []
    norm.register_forward_hook(lambda *_: forwards.append(1))
    assert difference(gradients(network, EXAMPLES, 4), plain) < 1e-6
    assert len(forwards) == 4, "two micro-batches, each computed twice"


class LongStep(CausalLM):
    """As in a step of a hundred thousand targets, where each one's share of the gradient is tiny."""

    @staticmethod
    def loss_sum(network, batch):
        return CausalLM.loss_sum(network, batch) / 128


def test_a_float16_base_gives_gradients_close_to_those_of_float32_thanks_to_the_loss_scale(monkeypatch):
    """Below 6e-5 float16 loses bits: without the scale, rounding is a visible part of the gradient."""
    rows = [example(index, 101, 1) for index in range(8)]
    model = adapted(dtype=torch.float16)
    reference = gradients(adapted(), rows, 4, LongStep)
    assert difference(gradients(model, rows, 4, LongStep), reference) < 0.005
    monkeypatch.setattr(loop, "FLOAT16_LOSS_SCALE", 1.0)
    assert difference(gradients(model, rows, 4, LongStep), reference) > 0.02


class FlatSGD(FlatAdamW):
    """weight -= gradient: shows what gradient an update was given."""

    def update(self, finite: Tensor) -> None:
        if finite:
            self.values.sub_(self.gradients)


class Reads(TorchDispatchMode):
    """Counts the operations that make a host wait for its device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "unique", "_unique2", "masked_select", "is_nonzero"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
def test_the_device_is_asked_for_nothing_inside_a_step_and_once_at_its_end(task):
    network = fast(adapted(task=task), task)
    rows = EXAMPLES if task == "causal_lm" else LABELLED
    batches, optimizer = cut(rows, 4, network.layout), FlatAdamW(network.model, TrainingSection())
    with Reads() as inside:
        accumulate_gradients(network, TASKS[task], batches, CPU)
    assert inside.names == []
    with Reads() as whole:
        train_step(network, TASKS[task], batches, optimizer, 1.0, CPU)
    assert len(whole.names) <= 2, "the loss and the norm"


def sgd(model: Any) -> FlatSGD:
    return FlatSGD(model, TrainingSection())


def update_of(model: Any, max_grad_norm: float | None) -> tuple[Tensor, float]:
    """(the change of all weights by one SGD step with rate 1, the norm that the step reports)"""
    before = {name: p.detach().clone() for name, p in trained_parameters(model).items()}
    _, norm = train_step(Network(model), CausalLM, cut(EXAMPLES, 4), sgd(model), max_grad_norm, CPU)
    after = trained_parameters(model)
    return flat({name: before[name] - after[name].detach() for name in before}), norm


def test_clipping_shortens_the_gradient_to_the_limit_and_reports_its_norm_before():
    gradient = flat(gradients(adapted(), EXAMPLES, 4))
    limit = float(gradient.norm()) / 3
    update, norm = update_of(adapted(), limit)
    assert norm == pytest.approx(float(gradient.norm()), rel=1e-5)
    torch.testing.assert_close(update, gradient / 3, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("limit", [None, 1e6])
def test_a_gradient_below_the_limit_or_without_one_is_used_as_it_is(limit):
    gradient = flat(gradients(adapted(), EXAMPLES, 4))
    update, norm = update_of(adapted(), limit)
    assert norm == pytest.approx(float(gradient.norm()), rel=1e-5)
    torch.testing.assert_close(update, gradient, rtol=1e-3, atol=1e-6)


def steps_of(model: Any, size: int, start: int = 0, settings: LoopSettings = SETTINGS) -> list[loop.Step]:
    optimizer = FlatAdamW(model, TrainingSection(weight_decay=0.01))
    plan = StepPlan(len(EXAMPLES), size, 8 // size, seed=1)
    return list(train_steps(Network(model), CausalLM, EXAMPLES, plan, optimizer, settings, start=start, device=CPU))


def test_a_whole_run_has_the_same_losses_in_any_number_of_micro_batches():
    reference = [step.loss for step in steps_of(adapted(), 8)]
    assert reference[-1] < reference[0]
    for size in CUTS[1:]:
        assert [step.loss for step in steps_of(adapted(), size)] == pytest.approx(reference, rel=1e-5)


def test_a_step_is_laid_out_once_when_all_work_of_the_one_before_is_on_its_way(monkeypatch):
    """Not earlier, since the device would idle meanwhile; and not after its figures have been waited for."""
    events: list[str] = []
    lay, update = loop.collate, FlatAdamW.update
    monkeypatch.setattr(loop, "collate", lambda *given: events.append("rows") or lay(*given))
    monkeypatch.setattr(FlatAdamW, "update", lambda *given: events.append("update") or update(*given))
    optimizer, plan = FlatAdamW(model := adapted(), TrainingSection()), StepPlan(len(EXAMPLES), 8, 1, seed=1)
    for _ in train_steps(Network(model), CausalLM, EXAMPLES, plan, optimizer, SETTINGS, start=0, device=CPU):
        events.append("figures")
    between = ["update", "rows", "figures"]
    assert events == ["rows", *between * (SETTINGS.total_steps - 1), "update", "figures"]


def test_steps_are_counted_from_one_and_carry_the_schedules_rate():
    steps = steps_of(adapted(), 4)
    assert [step.number for step in steps] == [1, 2, 3, 4, 5]
    assert [step.learning_rate for step in steps] == pytest.approx([0.005, 0.01, 0.01, 0.01 * 2 / 3, 0.01 / 3])
    assert {step.num_tokens for step in steps} == {sum(length for length, _ in LENGTHS)}
    assert {step.num_targets for step in steps} == {sum(length - prompt for length, prompt in LENGTHS)}


def test_a_run_that_begins_later_sees_the_rows_and_the_rate_of_that_step():
    straight, late = steps_of(adapted(), 2), steps_of(adapted(), 2, start=3)
    assert [s.number for s in late] == [4, 5]
    assert [s.learning_rate for s in late] == [s.learning_rate for s in straight[3:]]


def poisoned(model: Any) -> Any:
    with torch.no_grad():
        next(iter(adapters_of(model).values())).lora_A[0, 0] = float("nan")
    return model


def test_a_loss_that_is_no_number_stops_before_the_update_and_names_the_rows():
    model = poisoned(adapted())
    before = {name: p.detach().clone() for name, p in trained_parameters(model).items()}
    with pytest.raises(NonFiniteError, match=r"the loss is not finite.*rows\.jsonl:1, rows\.jsonl:2") as caught:
        train_step(Network(model), CausalLM, cut(EXAMPLES, 8), sgd(model), 1.0, CPU)
    assert caught.value.exit_code == 3
    for name, parameter in trained_parameters(model).items():
        assert torch.equal(parameter.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


class OneBadRow(CausalLM):
    """A loss that is infinite for the shortest row only."""

    @staticmethod
    def loss_sum(network, batch):
        loss = CausalLM.loss_sum(network, batch)
        return loss * float("inf") if "rows.jsonl:6" in batch.where else loss


def test_only_the_micro_batch_with_the_bad_loss_is_named():
    model = adapted()
    with pytest.raises(NonFiniteError) as caught:
        train_step(Network(model), OneBadRow, cut(EXAMPLES, 2), sgd(model), 1.0, CPU)
    assert "rows.jsonl:5, rows.jsonl:6" in caught.value.message
    assert "rows.jsonl:1" not in caught.value.message


class BadGradient(CausalLM):
    """A finite loss whose gradient is infinite."""

    @staticmethod
    def loss_sum(network, batch):
        layer = next(iter(adapters_of(network.model).values()))
        return CausalLM.loss_sum(network, batch) + (layer.lora_A - layer.lora_A.detach()).sum().abs().sqrt()


def test_a_gradient_that_is_not_finite_stops_before_the_update_too():
    model = adapted()
    before = flat({name: p.detach() for name, p in trained_parameters(model).items()})
    with pytest.raises(NonFiniteError, match="the gradient is not finite; the update was not made") as caught:
        train_step(Network(model), BadGradient, cut(EXAMPLES, 4), sgd(model), 1.0, CPU)
    assert "rows.jsonl:8" in caught.value.message
    assert torch.equal(flat({name: p.detach() for name, p in trained_parameters(model).items()}), before)


def test_more_than_eight_rows_are_named_as_a_number():
    rows = [example(index, 9, 2) for index in range(20)]
    model = poisoned(adapted())
    with pytest.raises(NonFiniteError, match=r"rows\.jsonl:8 and 12 more"):
        train_step(Network(model), CausalLM, cut(rows, 20), sgd(model), 1.0, CPU)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    ],
)
def test_memory_that_runs_out_in_a_step_is_told_with_a_cure(error):
    class Greedy(CausalLM):
        @staticmethod
        def loss_sum(network, batch):
            raise error

    model = adapted()
    steps = train_steps(
        Network(model), Greedy, EXAMPLES, StepPlan(8, 4, 2, 1), sgd(model), SETTINGS, start=0, device=CPU
    )
    with pytest.raises(OutOfMemoryError, match="out of memory") as caught:
        next(steps)
    assert caught.value.exit_code == 4
    assert "per_device_train_batch_size" in str(caught.value)


def test_another_runtime_error_stays_what_it_is():
    class Broken(CausalLM):
        @staticmethod
        def loss_sum(network, batch):
            raise RuntimeError("shapes do not match")

    model = adapted()
    with pytest.raises(RuntimeError, match="shapes do not match"):
        next(
            train_steps(
                Network(model), Broken, EXAMPLES, StepPlan(8, 4, 2, 1), sgd(model), SETTINGS, start=0, device=CPU
            )
        )


def test_dropout_changes_the_gradient_of_a_step_only_while_training():
    model = adapted()
    for layer in adapters_of(model).values():
        layer.dropout = nn.Dropout(0.5)
    without = gradients(adapted(), EXAMPLES, 4)
    torch.manual_seed(0)
    assert difference(gradients(model, EXAMPLES, 4), without) > 0.1
    assert difference(gradients(model.eval(), EXAMPLES, 4), without) < 1e-6


def test_a_run_whose_steps_are_all_done_makes_no_step():
    assert steps_of(adapted(), 4, settings=replace(SETTINGS, total_steps=0)) == []


def test_filling_draws_no_dropout_that_the_next_batch_would_have_drawn():
    """A process with nothing left to do runs a row again, so that layers in pieces are gathered by all at once."""
    model = adapted()
    for layer in adapters_of(model).values():
        layer.dropout = nn.Dropout(0.5)
    network = Network(model)
    batch = collate(EXAMPLES[:1], 0)

    def draw_behind(filling: list[Any]) -> Tensor:
        torch.manual_seed(0)
        accumulate_gradients(network, CausalLM, [batch], CPU, filling=filling)
        return torch.rand(4)

    expected = draw_behind([])
    assert torch.equal(draw_behind([batch, batch]), expected)
    torch.manual_seed(0)
    assert not torch.equal(torch.rand(4), expected), "the batch itself has drawn"


# --- waiting for the device -----------------------------------------------------------------------------------------

WAITS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
    torch.ops.aten.unique_dim.default,
    torch.ops.aten.equal.default,
}


class NoWaiting(TorchDispatchMode):
    """On a GPU these operations wait until it has done all that it was given."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        chosen = args[1] if func is torch.ops.aten.index.Tensor else []
        by_mask = any(index is not None and index.dtype == torch.bool for index in chosen)
        assert func not in WAITS and not by_mask, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


class Impatient(CausalLM):
    @staticmethod
    def loss_sum(network: Network, batch: Any) -> Tensor:
        loss = CausalLM.loss_sum(network, batch)
        return loss * float(loss.detach() > 0)


class Watched(FlatAdamW):
    """Nothing may wait up to the update, which on a CPU is made or left out by the host's choice."""

    def update(self, finite: Tensor) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            super().update(finite)


def step_without_waiting(network: Network, task: Any) -> None:
    optimizer = Watched(network.model, TrainingSection())
    with NoWaiting():
        train_step(network, task, cut(EXAMPLES, 2, network.layout), optimizer, 1.0, CPU)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_a_step_asks_the_device_for_nothing_until_its_end(kind):
    """Rows end to end; of padded ones transformers asks whether there is padding."""
    step_without_waiting(fast(adapted(kind)), CausalLM)


def test_a_step_that_asks_in_between_is_found():
    with pytest.raises(AssertionError, match="waits for the device"):
        step_without_waiting(fast(adapted()), Impatient)


@pytest.mark.gpu
def test_a_step_on_a_gpu_waits_for_it_at_its_end_only():
    device = torch.device("cuda")
    network = fast(adapted(dtype=torch.bfloat16).to(device))
    optimizer = FlatAdamW(network.model, TrainingSection())
    batches = cut(EXAMPLES, 2, network.layout)
    train_step(network, CausalLM, batches, optimizer, 1.0, device)
    torch.cuda.set_sync_debug_mode("error")
    train_step(
        network, CausalLM, batches, optimizer, 1.0, device, meanwhile=lambda: torch.cuda.set_sync_debug_mode("default")
    )

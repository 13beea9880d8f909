"""`lora train`: every training key does what it says, the right parameters change, and runs repeat bit for bit."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_cli.adapters.files import trained_tensors
from lora_cli.adapters.injection import base_name
from lora_cli.adapters.layer import LoRALinear
from lora_cli.commands import plan as plan_module
from lora_cli.commands import train as train_command
from lora_cli.commands import trainable
from lora_cli.commands.train import Outcome, train
from lora_cli.fusion import forms, proof
from lora_cli.fusion.frozen import FrozenLayers
from lora_cli.ops import kernels as kernels_module
from lora_cli.ops import liger
from lora_cli.ops.kernels import Kernels
from lora_cli.recipe import TrainingSection, load_recipe
from lora_cli.report.training import Silence
from lora_cli.training import run as run_module
from lora_cli.training.schedule import lr_multiplier
from tests.conftest import labelled_rows, write_jsonl
from tests.ops.formulas import FORMULAS


@dataclass
class Seen(Silence):
    """A finished run, and what could be watched on the way."""

    saves: list[int] = field(default_factory=list)
    eval_batches: list[int] = field(default_factory=list)
    forwards: int = 0  # of gated MLPs, with gradients
    groups: list[int] = field(default_factory=list)  # rows whose frozen layers were run
    kernels: list[Kernels] = field(default_factory=list)  # of each
    asked_for_cpu: list[bool] = field(default_factory=list)
    outcome: Outcome = None  # type: ignore[assignment]

    def saved(self, step) -> None:
        self.saves.append(step)

    def evaluation_advances(self, rows) -> None:
        self.eval_batches.append(rows)

    def column(self, name: str) -> list[float]:
        return [line[name] for line in self.outcome.lines if name in line]

    @property
    def steps(self) -> list[int]:
        return [line["step"] for line in self.outcome.lines if "loss" in line]

    @property
    def evaluated(self) -> list[int]:
        return [line["step"] for line in self.outcome.lines if "eval_loss" in line]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.outcome.output.checkpoints.iterdir())

    def weights(self, kind: str) -> Tensor:
        """All A or all B of the last checkpoint, as one vector."""
        tensors = load_file(self.outcome.output.checkpoints / self.checkpoints[-1] / "adapter_model.safetensors")
        return torch.cat([tensors[name].flatten() for name in sorted(tensors) if f"lora_{kind}" in name])


@pytest.fixture
def see(recipe, tmp_path, monkeypatch) -> Callable[..., Seen]:
    """``see("name", **changes)`` trains into a folder of that name and returns what was seen."""

    def go(name: str = "run", script: list[dict[str, float]] | None = None, **changes: Any) -> Seen:
        seen = Seen()
        gated, choose_device = forms.gated_low_rank, plan_module.choose_device
        compute = FrozenLayers._compute

        def forward(*inputs: Any, kernels: Kernels) -> Tensor:
            if torch.is_grad_enabled():  # neither proof nor evaluation
                seen.forwards += 1
                seen.kernels.append(kernels)
            return gated(*inputs)

        def computing(frozen: FrozenLayers, group: list[Any], *arguments: Any) -> None:
            seen.groups.append(len(group))
            compute(frozen, group, *arguments)

        def choose(use_cpu: bool) -> torch.device:
            seen.asked_for_cpu.append(use_cpu)
            return choose_device(True)

        with monkeypatch.context() as patch:
            patch.setattr(forms, "gated_low_rank", forward)
            patch.setattr(FrozenLayers, "_compute", computing)
            for place in (proof, trainable):
                patch.setattr(place, "why_not_compiled", lambda device: None)
            patch.setattr(kernels_module, "_compiled", lambda formula: formula)
            patch.setattr(trainable, "why_not_here", lambda device: None)
            patch.setattr(liger, "KERNELS", FORMULAS)
            patch.setattr(plan_module, "choose_device", choose)
            if script:
                left = iter(script)
                patch.setattr(run_module, "evaluate", lambda *rows, **options: next(left))
            path = recipe(name=f"{name}.yaml", output_dir=str(tmp_path / name), **changes)
            seen.outcome = train(load_recipe(path), seen)
        return seen

    return go


# --- every key of the training section ------------------------------------------------------------------------


def learning_rate(before: Seen, after: Seen) -> None:
    assert after.column("learning_rate") == pytest.approx([2 * rate for rate in before.column("learning_rate")])
    assert after.column("grad_norm")[0] == before.column("grad_norm")[0]
    assert torch.allclose(after.weights("B"), 2 * before.weights("B"), rtol=1e-5), "one step of Adam is linear in it"


def loraplus_lr_ratio(before: Seen, after: Seen) -> None:
    """One step of Adam is linear in the rate: B's is four times as long, and A, without a gradient yet, stays."""
    assert torch.allclose(after.weights("B"), 4 * before.weights("B"), rtol=1e-5)
    assert torch.equal(after.weights("A"), before.weights("A"))


def save_dtype(before: Seen, after: Seen) -> None:
    found = [load_file(seen.outcome.output.result / "adapter_model.safetensors") for seen in (before, after)]
    assert {tensor.dtype for tensor in found[0].values()} == {torch.float32}
    assert {tensor.dtype for tensor in found[1].values()} == {torch.float16}


def weight_decay(before: Seen, after: Seen) -> None:
    """While B is 0, A has no gradient, so a first step of 0.01 with a decay of 0.5 leaves 99.5 % of A."""
    torch.testing.assert_close(after.weights("A"), before.weights("A") * (1 - 0.01 * 0.5), rtol=1e-6, atol=0)
    assert torch.equal(after.weights("B"), before.weights("B"))


def gradient_accumulation_steps(before: Seen, after: Seen) -> None:
    assert after.column("epoch") == pytest.approx([2 * epoch for epoch in before.column("epoch")])
    assert after.forwards == 2 * before.forwards > 0
    assert after.column("tokens")[-1] > 1.5 * before.column("tokens")[-1]


def per_device_train_batch_size(before: Seen, after: Seen) -> None:
    assert after.column("epoch") == pytest.approx([epoch / 2 for epoch in before.column("epoch")])
    assert after.forwards == before.forwards
    assert after.column("tokens")[-1] < before.column("tokens")[-1] / 1.5


def per_device_eval_batch_size(before: Seen, after: Seen) -> None:
    assert before.eval_batches == [3, 3] * 2, "before training and at the end; no more rows or tokens than in training"
    assert after.eval_batches == [1] * 6 * 2
    assert after.column("eval_loss") == pytest.approx(before.column("eval_loss"), rel=1e-6)


def num_train_epochs(before: Seen, after: Seen) -> None:
    """24 rows in steps of 4 are 6 steps an epoch."""
    assert (before.steps[-1], after.steps[-1]) == (6, 9)


def max_steps(before: Seen, after: Seen) -> None:
    assert (before.steps[-1], after.steps[-1]) == (4, 3)


def schedule(kind: str) -> Callable[[Seen, Seen], None]:
    def lr_scheduler_type(before: Seen, after: Seen) -> None:
        for seen, name in [(before, "linear"), (after, kind)]:
            expected = [0.01 * lr_multiplier(name, step, 12, 1) for step in range(12)]
            assert seen.column("learning_rate") == pytest.approx(expected)
        assert after.column("learning_rate") != pytest.approx(before.column("learning_rate"))

    return lr_scheduler_type


def warmup_steps(before: Seen, after: Seen) -> None:
    assert before.column("learning_rate")[:2] == pytest.approx([0.01, 0.0075])
    assert after.column("learning_rate")[:3] == pytest.approx([0.005, 0.01, 0.01])


def max_grad_norm(before: Seen, after: Seen) -> None:
    """Adam undoes a scale, but not one that puts the gradient below its epsilon of 1e-8."""
    assert after.column("grad_norm")[0] == before.column("grad_norm")[0] > 0.1, "it is the norm before clipping"
    assert float(before.weights("B").abs().median()) > 1e-3
    assert float(after.weights("B").abs().max()) < 1e-5


def beta(before: Seen, after: Seen) -> None:
    """Bias correction makes the first update independent of both betas; the second one is not."""
    assert after.column("loss")[:2] == pytest.approx(before.column("loss")[:2], rel=1e-5)
    assert after.column("loss")[2] != pytest.approx(before.column("loss")[2], rel=1e-5)


def adam_epsilon(before: Seen, after: Seen) -> None:
    assert float(after.weights("B").abs().max()) < float(before.weights("B").abs().max()) / 5


def gradient_checkpointing(before: Seen, after: Seen) -> None:
    assert after.forwards == 2 * before.forwards > 0
    assert after.column("loss") == pytest.approx(before.column("loss"), rel=1e-6)


def selective_checkpointing(before: Seen, after: Seen) -> None:
    assert after.forwards == 1.5 * before.forwards > 0, "one of the two layers is computed twice"
    assert after.column("loss") == pytest.approx(before.column("loss"), rel=1e-6)


def cache_frozen_layers(before: Seen, after: Seen) -> None:
    """Beside the three rows of the proof, each group of four rows once in three epochs."""
    assert before.groups == []
    assert after.groups == [3, *[4] * 6]
    assert after.column("loss") == pytest.approx(before.column("loss"), rel=1e-6)


def torch_compile(before: Seen, after: Seen) -> None:
    assert set(before.kernels) == {Kernels.PLAIN}
    assert set(after.kernels) == {Kernels.COMPILED}


def use_liger_kernel(before: Seen, after: Seen) -> None:
    """Here its kernels are our own formulas; that its own give the same is shown in ``test_liger.py``."""
    assert set(before.kernels) == {Kernels.PLAIN}
    assert set(after.kernels) == {Kernels.LIGER}
    assert after.column("loss") == pytest.approx(before.column("loss"), rel=1e-6)


def use_cpu(before: Seen, after: Seen) -> None:
    assert (before.asked_for_cpu, after.asked_for_cpu) == ([True], [False])


def seed(before: Seen, after: Seen) -> None:
    assert not torch.equal(after.weights("A"), before.weights("A"))
    assert after.column("tokens") != before.column("tokens"), "the rows come in another order"


def logging_steps(before: Seen, after: Seen) -> None:
    assert before.steps == [1, 2, 3, 4, 5, 6, 7]
    assert after.steps == [1, 3, 6, 7]
    assert after.column("tokens")[-1] == before.column("tokens")[-1]


def eval_steps(before: Seen, after: Seen) -> None:
    assert before.evaluated == [0, 5, 7]
    assert after.evaluated == [0, 2, 4, 6, 7]


def save_steps(before: Seen, after: Seen) -> None:
    assert before.saves == [6, 7]
    assert after.saves == [2, 4, 6, 7]


def save_total_limit(before: Seen, after: Seen) -> None:
    assert before.checkpoints == ["step-000003", "step-000004"]
    assert after.checkpoints == ["step-000002", "step-000003", "step-000004"]


def early_stopping_patience(before: Seen, after: Seen) -> None:
    assert (before.steps[-1], before.outcome.summary.stopped_early) == (4, False)
    assert (after.steps[-1], after.outcome.summary.stopped_early) == (2, True)


def metric_for_best_model(before: Seen, after: Seen) -> None:
    assert before.outcome.summary.best_step == 1
    assert after.outcome.summary.best_step == 3
    assert after.outcome.summary.metric_for_best_model == "eval_token_accuracy"


def report_to(before: Seen, after: Seen) -> None:
    assert not (before.outcome.output.root / "tensorboard").exists()
    assert len(list((after.outcome.output.root / "tensorboard").iterdir())) == 1


def strategy(before: Seen, after: Seen) -> None:
    """What it does in several processes is shown in ``test_several_processes.py``."""
    note = "training.strategy: fsdp shards nothing in a single process"
    assert note not in before.outcome.plan.notes
    assert note in after.outcome.plan.notes


@dataclass(frozen=True)
class Trial:
    """One key: the changed value, what both runs need around it, and what the change must do."""

    value: Any
    claim: Callable[[Seen, Seen], None]
    around: dict[str, Any] = field(default_factory=dict)
    script: list[dict[str, float]] | None = None


ONE = {"max_steps": 1}
HELD_OUT = {"dataset.eval_size": 6}
ACCURACIES = [{"loss": loss, "token_accuracy": accuracy} for loss, accuracy in [(9, 0), (1, 0.1), (2, 0.2), (3, 0.3)]]
SCRIPT = [*ACCURACIES, {"loss": 4, "token_accuracy": 0.25}]

TRIALS: dict[str, list[Trial]] = {
    "learning_rate": [Trial(0.02, learning_rate, ONE)],
    "loraplus_lr_ratio": [Trial(4.0, loraplus_lr_ratio, ONE)],
    "save_dtype": [Trial("float16", save_dtype)],
    "weight_decay": [Trial(0.5, weight_decay, ONE | {"weight_decay": 0.0})],
    "gradient_accumulation_steps": [Trial(2, gradient_accumulation_steps)],
    "global_batch_size": [Trial(8, gradient_accumulation_steps)],
    "per_device_train_batch_size": [Trial(2, per_device_train_batch_size)],
    "per_device_eval_batch_size": [Trial(1, per_device_eval_batch_size, HELD_OUT)],
    "num_train_epochs": [Trial(1.5, num_train_epochs, {"max_steps": None, "num_train_epochs": 1.0})],
    "max_steps": [Trial(3, max_steps)],
    "lr_scheduler_type": [
        Trial(kind, schedule(kind), {"max_steps": 12}) for kind in ("cosine", "constant", "cosine_with_min_lr", "wsd")
    ],
    "warmup_steps": [Trial(2, warmup_steps, {"warmup_steps": 0}), Trial(0.5, warmup_steps, {"warmup_steps": 0})],
    "max_grad_norm": [Trial(1e-12, max_grad_norm, ONE | {"max_grad_norm": None})],
    "adam_beta1": [Trial(0.1, beta)],
    "adam_beta2": [Trial(0.1, beta)],
    "adam_epsilon": [Trial(1.0, adam_epsilon, ONE)],
    "gradient_checkpointing": [Trial(True, gradient_checkpointing), Trial("selective", selective_checkpointing)],
    "cache_frozen_layers": [
        Trial(where, cache_frozen_layers, {"max_steps": 18, "lora.layers_to_transform": [1]})
        for where in ("memory", "disk")
    ],
    "torch_compile": [Trial(True, torch_compile)],
    "use_liger_kernel": [Trial(True, use_liger_kernel)],
    "strategy": [Trial("fsdp", strategy)],
    "use_cpu": [Trial(False, use_cpu)],
    "seed": [Trial(43, seed)],
    "logging_steps": [Trial(3, logging_steps, {"max_steps": 7})],
    "eval_steps": [Trial(2, eval_steps, HELD_OUT | {"max_steps": 7})],
    "save_steps": [Trial(2, save_steps, {"max_steps": 7})],
    "save_total_limit": [Trial(3, save_total_limit, {"save_steps": 1})],
    "early_stopping_patience": [Trial(1, early_stopping_patience, HELD_OUT | {"eval_steps": 1}, SCRIPT)],
    "metric_for_best_model": [
        Trial("eval_token_accuracy", metric_for_best_model, HELD_OUT | {"eval_steps": 1}, SCRIPT)
    ],
    "report_to": [Trial("tensorboard", report_to)],
}


def test_the_table_covers_every_key_of_the_training_section():
    assert set(TRIALS) == set(TrainingSection.model_fields)


@pytest.mark.parametrize(
    ("key", "trial"), [pytest.param(key, trial, id=f"{key}={trial.value}") for key in TRIALS for trial in TRIALS[key]]
)
def test_a_changed_key_changes_what_it_says(see, key, trial):
    around = {name if "." in name else f"training.{name}": value for name, value in trial.around.items()}
    before = see("before", trial.script, **around)
    trial.claim(before, see("after", trial.script, **around | {f"training.{key}": trial.value}))


# --- equal runs -----------------------------------------------------------------------------------------------


def comparable(seen: Seen) -> list[dict[str, Any]]:
    """Every line of metrics, less what depends on the clock and on other processes."""
    machine = ("tokens_per_second", "peak_memory_bytes")
    return [{key: value for key, value in line.items() if key not in machine} for line in seen.outcome.lines]


def adapter(seen: Seen) -> bytes:
    return (seen.outcome.output.result / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_recipe_gives_the_same_bytes_and_another_seed_gives_others(see, dropout):
    changes = {"lora.lora_dropout": dropout, "dataset.eval_size": 4}
    first, second = see("first", **changes), see("second", **changes)
    assert adapter(first) == adapter(second)
    assert comparable(first) == comparable(second)
    other = see("other", **changes, **{"training.seed": 7})
    assert adapter(other) != adapter(first)
    assert comparable(other) != comparable(first)


def test_dropout_changes_a_run_from_its_second_step_and_never_its_evaluations(see):
    """B begins at 0, so the first loss does not see the dropout; the first gradient does."""
    without, with_dropout = see("without", **HELD_OUT), see("with", **HELD_OUT, **{"lora.lora_dropout": 0.5})
    assert with_dropout.column("loss")[0] == pytest.approx(without.column("loss")[0], rel=1e-6)
    assert abs(with_dropout.column("loss")[2] - without.column("loss")[2]) > 1e-4
    assert with_dropout.column("eval_loss")[0] == pytest.approx(without.column("eval_loss")[0], rel=1e-6)


def test_dropout_draws_from_a_stream_of_its_own(see, monkeypatch):
    """Whatever was drawn while the model was made (a head, an initialisation) leaves the run's dropout alone."""
    changes = {"lora.lora_dropout": 0.3}
    first, build = see("first", **changes), train_command.build_model

    def build_and_draw(*arguments: Any, **options: Any) -> Any:
        model = build(*arguments, **options)
        torch.rand(1000)
        return model

    monkeypatch.setattr(train_command, "build_model", build_and_draw)
    assert adapter(see("second", **changes)) == adapter(first)


def test_one_times_eight_two_times_four_and_eight_times_one_are_the_same_run(see):
    curves, adapters = [], []
    for size, accumulation in [(8, 1), (4, 2), (1, 8)]:
        cut = {"training.per_device_train_batch_size": size, "training.gradient_accumulation_steps": accumulation}
        seen = see(f"{size}x{accumulation}", **cut, **{"training.max_steps": 8})
        curves.append(seen.column("loss"))
        adapters.append(seen.weights("B").double())
    assert curves[0][-1] < curves[0][0] - 0.1, "nothing was learned, so nothing was compared"
    for curve, weights in zip(curves[1:], adapters[1:], strict=True):
        assert curve == pytest.approx(curves[0], rel=1e-5)
        assert float((weights - adapters[0]).norm() / adapters[0].norm()) < 1e-3


# --- which parameters change ----------------------------------------------------------------------------------


@pytest.fixture
def models(monkeypatch) -> list[Any]:
    """Every model that a run builds, with its parameters as they were before training."""
    built: list[Any] = []
    original = train_command.build_model

    def build(*arguments: Any, **options: Any) -> Any:
        model = original(*arguments, **options)
        before = {base_name(name): p.detach().clone() for name, p in model.named_parameters()}
        built.append((model, before))
        return model

    monkeypatch.setattr(train_command, "build_model", build)
    return built


def changed_parameters(models: list[Any]) -> set[str]:
    ((model, before),) = models
    return {
        base_name(name) for name, p in model.named_parameters() if not torch.equal(p.detach(), before[base_name(name)])
    }


@pytest.fixture
def classify(see, model_folder, tmp_path) -> Callable[..., Seen]:
    def go(kind: str = "bert", base_task: str = "sequence_classification", **changes: Any) -> Seen:
        rows = write_jsonl(tmp_path / "labelled.jsonl", labelled_rows(16))
        base = {"path": str(model_folder(kind, base_task)), "dtype": "float32"}
        return see(task="sequence_classification", model=base, **{"dataset.path": str(rows)}, **changes)

    return go


def test_lora_changes_every_a_and_b_and_no_other_bit(see, models, model_folder):
    seen = see()
    ((model, _),) = models
    layers = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    assert len(layers) == 2 * 7
    assert changed_parameters(models) == {f"{name}.{kind}" for name in layers for kind in ("lora_A", "lora_B")}
    parameters = {base_name(name): p for name, p in model.named_parameters()}
    for name, tensor in load_file(model_folder("llama") / "model.safetensors").items():
        assert torch.equal(parameters[name], tensor), name
    assert all(parameter.grad is None for name, parameter in parameters.items() if "lora_" not in name)
    delivered = load_file(seen.outcome.output.result / "adapter_model.safetensors")
    assert len(delivered) == 28


def test_lora_on_a_classifier_changes_its_head_too(classify, models):
    classify()
    changed = changed_parameters(models)
    assert {name for name in changed if "lora_" not in name} == {"classifier.weight", "classifier.bias"}
    assert len(changed) == 2 * 2 * 6 + 2 * 1 + 2, "six layers in each of two blocks, the pooler, the head"


def test_head_changes_the_classifier_and_no_other_bit(classify, models):
    seen = classify(method="head", lora={})
    assert changed_parameters(models) == {"classifier.weight", "classifier.bias"}
    assert seen.outcome.summary.parameters["trainable"] == 2 * 32 + 2


def test_head_changes_the_named_modules_of_a_causal_model_and_no_other_bit(see, models):
    see(method="head", lora={"modules_to_save": ["layers.1.mlp"]})
    assert changed_parameters(models) == {
        f"model.layers.1.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")
    }


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
def test_full_changes_every_parameter(see, classify, models, task):
    seen = see(method="full", lora={}) if task == "causal_lm" else classify(method="full", lora={})
    ((model, _),) = models
    assert changed_parameters(models) == {name for name, _ in model.named_parameters()}
    assert seen.outcome.summary.parameters["percent"] == 100.0


@pytest.mark.parametrize(
    ("method", "task"),
    [("full", "causal_lm"), ("full", "sequence_classification"), ("head", "sequence_classification")],
)
def test_a_baseline_delivers_a_plain_model_folder_that_transformers_loads(see, classify, models, method, task):
    seen = (see if task == "causal_lm" else classify)(method=method, lora={})
    folder = seen.outcome.output.result
    auto = {
        "causal_lm": transformers.AutoModelForCausalLM,
        "sequence_classification": transformers.AutoModelForSequenceClassification,
    }[task]
    loaded, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    trained = dict(models[0][0].named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trained[name]), name
    assert transformers.AutoTokenizer.from_pretrained(folder)("the cat")["input_ids"]
    if task == "sequence_classification":
        assert loaded.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_in_half_precision_stays_so_and_its_adapter_is_float32(see, models, dtype):
    seen = see(**{"model.dtype": dtype})
    ((model, _),) = models
    assert {p.dtype for name, p in model.named_parameters() if "lora_" not in name} == {getattr(torch, dtype)}
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    assert seen.outcome.summary.dtype == dtype
    assert all(math.isfinite(loss) for loss in seen.column("loss"))


def test_the_delivered_adapter_is_the_trained_one_and_names_its_base(see, models, model_folder):
    seen = see()
    delivered = load_file(seen.outcome.output.result / "adapter_model.safetensors")
    trained = trained_tensors(models[0][0])
    assert {name.removeprefix("base_model.model.").removesuffix(".weight") for name in delivered} == set(trained)
    for name, tensor in trained.items():
        assert torch.equal(delivered[f"base_model.model.{name}.weight"], tensor)
    config = json.loads((seen.outcome.output.result / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_folder("llama"))


# --- a random base --------------------------------------------------------------------------------------------


def test_a_random_base_is_kept_with_the_run_and_the_adapter_belongs_to_it(see, model_folder, lora):
    config = json.loads((model_folder("llama") / "config.json").read_text())
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    inline = {key: config[key] for key in ("model_type", "num_key_value_heads", *sizes)}
    base = {"config": inline, "tokenizer": str(model_folder("llama")), "dtype": "float32"}
    seen, again = see("random", model=base), see("again", model=base)
    assert adapter(seen) == adapter(again)
    folder = seen.outcome.output.base
    assert (folder / "model.safetensors").read_bytes() == (again.outcome.output.base / "model.safetensors").read_bytes()
    merged = lora("merge", seen.outcome.output.result, "--json")
    assert merged.code == 0, merged.err
    assert merged.json["base"] == str(folder)


# --- trackers -------------------------------------------------------------------------------------------------


def test_tensorboard_holds_every_figure_of_the_metrics(see):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = see(**HELD_OUT, **{"training.report_to": "tensorboard"})
    events = EventAccumulator(str(seen.outcome.output.root / "tensorboard")).Reload()
    found = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    lines = seen.outcome.lines
    expected = {(key, line["step"]): value for line in lines for key, value in line.items() if key != "step"}
    assert found == pytest.approx(expected, rel=1e-6)  # event files hold float32


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_every_line_and_is_closed_even_after_a_crash(see, monkeypatch, name):
    calls: list[Any] = []
    fake = SimpleNamespace(
        init=lambda **arguments: calls.append(arguments["config"]["training"]["learning_rate"]),
        log=lambda values, step: calls.append((step, set(values) >= {"loss", "learning_rate", "grad_norm"})),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    see(**{"training.report_to": [name]})
    assert calls == [0.01, (1, True), (2, True), (3, True), (4, True), "finish"]
    calls.clear()
    monkeypatch.setattr(Seen, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        see("crashed", **{"training.report_to": [name]})
    assert calls == [0.01, "finish"]


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_missing_tracker_is_refused_before_anything_is_written(recipe, lora, monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    result = lora("train", recipe(**{"training.report_to": name}))
    assert result.code == 2
    assert f"training.report_to: {name} is not installed" in result.err
    assert f"pip install 'lora-cli[{name}]'" in result.err
    assert not (tmp_path / "run").exists()


# --- what can go wrong ----------------------------------------------------------------------------------------


@pytest.fixture
def damaged_base(model_folder, tmp_path) -> Callable[[Callable[[dict[str, Tensor]], None]], Path]:
    """A copy of the tiny model whose tensors were changed."""

    def make(change: Callable[[dict[str, Tensor]], None]) -> Path:
        folder = tmp_path / "damaged"
        folder.mkdir()
        for file in model_folder("llama").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def test_a_base_with_a_weight_that_is_no_number_is_refused(recipe, lora, damaged_base):
    name = "model.layers.1.mlp.up_proj.weight"
    base = damaged_base(lambda tensors: tensors[name][3, 5].fill_(float("nan")))
    result = lora("train", recipe(model={"path": str(base), "dtype": "float32"}))
    assert result.code == 5
    assert f"{name} in {base} holds values that are not finite" in result.err


def test_a_base_that_lacks_a_frozen_weight_is_refused(recipe, lora, damaged_base):
    name = "model.layers.1.mlp.up_proj.weight"
    base = damaged_base(lambda tensors: tensors.pop(name))
    result = lora("train", recipe(model={"path": str(base), "dtype": "float32"}))
    assert result.code == 2
    assert f"lack {name}: they would be random" in result.err


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried")])
def test_memory_that_runs_out_while_loading_is_exit_code_4(recipe, lora, monkeypatch, error):
    def load(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    result = lora("train", recipe())
    assert result.code == 4, result.err
    assert "out of memory" in result.err
    assert "smaller model" in result.err


def test_memory_that_runs_out_in_a_step_is_exit_code_4_and_its_cures_are_not_refused(recipe, lora, monkeypatch):
    """Two steps are done and saved when the longest row comes: the advice must work without starting over."""
    from lora_cli.training import loop

    train_step, calls = loop.train_step, []

    def greedy(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return train_step(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", greedy)
        result = lora("train", recipe(**{"training.save_steps": 2}))
    assert result.code == 4
    assert "lower training.per_device_train_batch_size (and raise gradient_accumulation_steps" in result.err
    assert "set training.gradient_checkpointing: true" in result.err
    cures = ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"]
    resumed = lora("train", recipe(), *cures, "training.gradient_checkpointing=true")
    assert resumed.code == 0, resumed.err
    assert "resuming after step 2 of 4" in resumed.out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own import
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which torch hides by hand
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # by torch's own compiler
def test_torch_compile_trains_with_dropout(kind, recipe, tmp_path, model_folder):
    """Fused forms draw what they draw without it; whole layers draw anew, and the loss is about the same."""
    losses = []
    for compiled in (False, True):
        model = {"path": str(model_folder(kind)), "dtype": "float32"}
        changes = {"training.torch_compile": compiled, "training.max_steps": 6, "lora.lora_dropout": 0.1}
        path = recipe(name=f"{compiled}.yaml", output_dir=str(tmp_path / str(compiled)), model=model, **changes)
        losses.append(train(load_recipe(path), Silence()).lines[-1]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel={"llama": 1e-4, "gpt2": 0.05}[kind])


@pytest.mark.slow
@pytest.mark.parametrize(  # with fused forms, and without; and on a quantized base
    ("kind", "quantization"), [("llama", "none"), ("gpt2", "none"), ("llama", "nf4")]
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own import
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which torch hides by hand
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # by torch's own compiler
def test_torch_compile_trains_like_eager(kind, quantization, recipe, tmp_path, model_folder):
    """Two steps and an evaluation, compiled in earnest."""
    outcomes = []
    for compiled in (False, True):
        path = recipe(
            name=f"{compiled}.yaml",
            output_dir=str(tmp_path / str(compiled)),
            model={"path": str(model_folder(kind)), "dtype": "float32", "quantization": quantization},
            **{"training.torch_compile": compiled, "training.max_steps": 2, "dataset.eval_size": 4},
        )
        outcomes.append(train(load_recipe(path), Silence()))
    eager, compiled = ([line.get("loss", line.get("eval_loss")) for line in o.lines] for o in outcomes)
    assert compiled == pytest.approx(eager, rel=1e-4)
    tensors = [load_file(o.output.result / "adapter_model.safetensors") for o in outcomes]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, rtol=1e-3, atol=1e-4)

"""The memory plan of `lora check`: its parts against closed forms, and what it says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from lora_cli.commands import memory as memory_module
from lora_cli.commands import trainable
from lora_cli.commands.memory import BY_SIZES, MemoryPlan, MemoryPlanner, memory_note
from lora_cli.commands.plan import make_plan
from lora_cli.data.batches import collate
from lora_cli.distributed import World
from lora_cli.ops import attention
from lora_cli.ops.sight import Sight
from lora_cli.ops.tiles import Tiling, tiling_of
from lora_cli.recipe import load_recipe
from tests.conftest import labelled_rows, write_jsonl

HIDDEN, INNER, VALUES, LAYERS, VOCABULARY, R = 32, 48, 16, 2, 320, 4
# (in, out) of q, k, v, o, gate, up, down
SHAPES = [(32, 32), (32, VALUES), (32, VALUES), (32, 32), (32, 48), (32, 48), (48, 32)]
ADAPTERS = LAYERS * sum(R * (i + o) for i, o in SHAPES)
FROZEN = LAYERS * (sum(i * o for i, o in SHAPES) + 2 * HIDDEN) + VOCABULARY * HIDDEN + HIDDEN
BUFFERS = 2 * 4 * 4  # the rotary frequencies, and those they began as


def planner(path, *changes: str) -> MemoryPlanner:
    return MemoryPlanner(make_plan(load_recipe(path, list(changes))))


def memory(path, *changes: str) -> MemoryPlan:
    return planner(path, *changes).memory()


def test_resident_parts_are_the_parameters(recipe):
    found = memory(recipe())
    assert found.weights == 4 * FROZEN + BUFFERS
    assert (found.adapters, found.gradients, found.optimizer) == (4 * ADAPTERS, 4 * ADAPTERS, 8 * ADAPTERS)


def test_frozen_weights_shrink_with_their_dtype_and_adapters_do_not(recipe):
    found = memory(recipe(), "model.dtype=bfloat16")
    assert found.weights == 2 * FROZEN + BUFFERS
    assert found.adapters == 4 * ADAPTERS


@pytest.mark.parametrize("every_token", [True, False])
def test_activations_of_a_fused_llama_by_hand(recipe, every_token):
    """What each autograd node saves, for N tokens; for those of the ending alone behind the last keys and values."""
    found = planner(recipe(), f"dataset.train_on_prompt={str(every_token).lower()}")
    plan = found.memory()
    n = plan.tokens
    projected = (HIDDEN + 1) + HIDDEN + 3 * R  # a norm: x and 1 / its length; q, k, v of one input, and its A x
    behind = (
        HIDDEN  # attention: q, beside k and v
        + HIDDEN + R  # o_proj's input, and A x
        + (HIDDEN + 1)  # the second norm
        + HIDDEN + 2 * R  # gate and up of one input
        + 2 * INNER + R  # the gated half: gate, up, and down's A x
    )  # fmt: skip
    rows = found.plan.steps.largest_micro_batch(found.plan.dataset.train, 4, found.network.layout)
    batch = collate(rows, 0, found.network.layout)
    assert (batch.ending is None) is every_token
    e = n if batch.ending is None else len(batch.ending.places)
    layers = (LAYERS - 1) * n * (projected + 2 * VALUES + behind) + n * (projected + 2 * VALUES) + e * behind
    if batch.ending is not None:
        layers += e * (projected + 2 * 8)  # begun again, with cos and sin of its own
    layers -= n * (HIDDEN + 1)  # nothing below the first norm is trained
    ends = e * (HIDDEN + 1) + n * 2 * 8  # the last norm; cos and sin
    head = sum(row.num_targets for row in rows) * HIDDEN
    matrices = LAYERS * R * (3 * 32 + 2 * 32 + 32 + 2 * 16 + 32 + 2 * 48 + 32)  # A stacked, B scaled
    matrices += 0 if batch.ending is None else R * (3 * 32 + 32 + 2 * 16)
    each = [batch.rows] * (LAYERS - 1) + [batch.rows if batch.ending is None else batch.ending.rows]
    tilings = [tiling_of(rows, torch.empty(1, 4, 8), torch.empty(1, 2, 8), Sight(8**-0.5)) for rows in each]
    probabilities = sum(tile.num_scores for tiling in tilings for tile in tiling.tiles)
    floats = layers + ends + head + matrices + probabilities
    assert plan.activations == pytest.approx(4 * floats + bytes_of_tables(tilings), rel=0.005)


def on_cuda(path, monkeypatch: pytest.MonkeyPatch, *changes: str) -> MemoryPlanner:
    """A plan for a device that is not here, with 8 GB."""
    monkeypatch.setattr(memory_module, "available_bytes", lambda device: 8 * 10**9)
    monkeypatch.setattr(trainable, "choose_device", lambda use_cpu: torch.device("cuda"))
    plan = make_plan(load_recipe(path, ["model.dtype=bfloat16", "dataset.train_on_prompt=true", *changes]))
    return MemoryPlanner(replace(plan, device=torch.device("cuda")))


def test_activations_on_cuda_by_hand(recipe, monkeypatch):
    """Flash attention keeps its output, which the next projection keeps anyway, and a float32 number a head.

    With torch 2.11 a trial on the device would have shown whether keys are copied; here it says no.
    """
    monkeypatch.setattr(attention, "_shares_keys_by_itself", lambda device, dtype: True)
    found = on_cuda(recipe(), monkeypatch)
    plan = found.memory()
    n, heads = plan.tokens, 4
    assert found.network.layout.multiple == 1
    narrow = n * LAYERS * (HIDDEN + 3 * R + HIDDEN)  # q, k, v of one input, and its A x; the layer's own input
    narrow += n * LAYERS * (HIDDEN + 2 * VALUES + HIDDEN + R)  # q, k, v; attention's output, and A x
    narrow += n * LAYERS * (2 * HIDDEN + 2 * R + 2 * INNER + R)  # the second norm's input; gate and up; down
    narrow += n * (HIDDEN + 2 * 8)  # the last norm's input; cos and sin
    narrow -= n * HIDDEN  # nothing below the first norm is trained
    rows = found.plan.steps.largest_micro_batch(found.plan.dataset.train, 4, found.network.layout)
    narrow += sum(row.num_targets for row in rows) * HIDDEN  # the head's gradient
    narrow += LAYERS * R * (3 * 32 + 2 * 32 + 32 + 2 * 16 + 32 + 2 * 48 + 32)  # A stacked, B scaled
    wide = n * LAYERS * (2 + heads)  # lengths of norms, and of the last one for the first; logarithms of sums
    assert plan.activations == pytest.approx(2 * narrow + 4 * wide, rel=0.005)
    assert (plan.process, plan.heap) == (0, 0)


def test_offloaded_inputs_weigh_nothing_on_cuda_but_the_two_that_are_on_their_way(recipe, monkeypatch):
    path, key = recipe(), "training.gradient_checkpointing"
    kept, offloaded = (on_cuda(path, monkeypatch, f"{key}={how}").memory() for how in ("true", "offload"))
    inputs = LAYERS * kept.tokens * HIDDEN * 2
    tables = kept.tokens * (2 * 8 * 2 + 8)  # of positions, which torch's own way keeps as well, uncounted
    assert kept.activations - offloaded.activations == pytest.approx(inputs, abs=tables)
    assert offloaded.temporaries <= kept.temporaries + inputs + tables


def bytes_of_tables(tilings: list[Tiling]) -> int:
    """Masks, and where tokens lie in tiles: the same in all layers."""
    masks = {id(t.bias): t.bias.nbytes for tiling in tilings for t in tiling.tiles if t.bias is not None}
    places = {id(p): p for tiling in tilings for p in (tiling.queries, tiling.keys)}.values()
    return sum(masks.values()) + sum(table.nbytes for p in places for table in (p.tokens, p.padding, p.back))


def test_logits_are_a_chunk_or_all_of_them(recipe):
    found = planner(recipe())
    rows = found.plan.steps.largest_micro_batch(found.plan.dataset.train, 4, found.network.layout)
    targets = sum(row.num_targets for row in rows)
    assert found.memory().logits == targets * VOCABULARY * 4, "fewer than a chunk holds, turned into their gradient"
    assert memory(recipe(), "model.dtype=bfloat16").logits == targets * VOCABULARY * (2 + 4)


def test_kernels_are_kept_for_the_sizes_of_products_where_onednn_multiplies(recipe, monkeypatch):
    found = planner(recipe(), "model.dtype=bfloat16")
    whole = found.memory()
    assert found._kernels(found.plan.steps, []) > 0
    monkeypatch.setattr(memory_module, "KERNELS_KEPT", 50)
    few = found.memory()
    assert few.heap < whole.heap
    assert few.evaluation == whole.evaluation, "there is none"
    monkeypatch.setattr(memory_module, "KERNELS_KEPT", 40)
    assert few.heap - found.memory().heap == 10 * memory_module.KERNEL_BYTES_IN_TURN, "no more than fit are kept"
    assert planner(recipe(), "model.dtype=float32")._kernels(found.plan.steps, []) == 0, "small matrices are MKL's"


def test_an_evaluation_of_new_sizes_brings_kernels_that_stay(recipe):
    """They are there while training, too."""
    other = memory(recipe(rows=24), "model.dtype=bfloat16", "dataset.eval_size=16", "training.max_steps=1")
    few = memory(recipe(rows=24), "model.dtype=bfloat16", "dataset.eval_size=1", "training.max_steps=1")
    assert other.heap > few.heap
    assert other.evaluation - few.evaluation >= other.heap - few.heap > 0


def test_the_total_is_the_sum_of_its_parts(recipe):
    found = memory(recipe())
    parts = ("process", "weights", "adapters", "gradients", "optimizer", "activations", "logits", "temporaries", "heap")
    assert found.training == sum(getattr(found, part) for part in parts)
    assert found.total == max(found.training, found.loading, found.evaluation, found.saving)


def test_the_largest_micro_batch_of_the_run_counts_and_not_max_length(recipe):
    path = recipe()
    assert memory(path).activations == memory(path, "dataset.max_length=128").activations
    one, four = (memory(path, f"training.per_device_train_batch_size={rows}") for rows in (1, 4))
    assert (one.rows, four.rows) == (1, 4)
    assert one.activations < four.activations


def test_checkpointing_is_planned(recipe):
    plain, less = memory(recipe()), memory(recipe(), "training.gradient_checkpointing=true")
    assert less.activations < plain.activations / 2


def test_full_training_has_moments_of_all_weights(recipe):
    found = memory(recipe(), "method=full", "lora={}")
    assert found.weights == BUFFERS
    assert found.optimizer == 8 * FROZEN, "the tied embedding once"


def test_a_classifiers_head_is_trained_in_float32(recipe, model_folder, tmp_path):
    rows = write_jsonl(tmp_path / "labelled.jsonl", labelled_rows(12))
    base = str(model_folder("bert", "sequence_classification"))
    changes = [f"model.path={base}", "task=sequence_classification", f"dataset.path={rows}", "method=head", "lora={}"]
    head = 32 * 2 + 2
    found = memory(recipe(), *changes)
    assert found.adapters == 4 * (64 + 16), f"{head} values, each tensor on a cache line of its own"
    assert found.logits == 0


def test_evaluation_stays_below_training(recipe):
    for changes in ([], ["model.attn_implementation=sdpa"], ["training.gradient_checkpointing=true"]):
        found = memory(recipe(**{"dataset.eval_size": 8}), *changes)
        assert 0 < found.evaluation <= found.training


def test_planning_leaves_the_plan_as_it_was(recipe):
    plan = make_plan(load_recipe(recipe()))
    before = plan.model.config._attn_implementation
    MemoryPlanner(plan).memory()
    assert plan.model.config._attn_implementation == before


def test_a_plan_beyond_the_machine_names_what_to_lower(recipe):
    plan = make_plan(load_recipe(recipe(**{"dataset.max_length": 512})))
    found = MemoryPlanner(plan).memory()
    assert memory_note(found, plan) is None
    note = memory_note(replace(found, limit=10**6, weights=0), plan)
    assert note is not None
    assert "training.per_device_train_batch_size" in note
    assert "dataset.max_length" in note
    assert "gradient_checkpointing: true" in note
    assert "bfloat16" in note
    assert memory_note(replace(found, limit=None), plan) is None
    heavy = replace(found, limit=10**6, weights=10**12)
    assert "quantization" not in (memory_note(heavy, plan) or ""), "on the CPU the dense base is read whole"
    assert "set model.quantization: nf4" in (memory_note(heavy, replace(plan, device=torch.device("cuda"))) or "")


def test_check_shows_the_table_and_json_holds_bytes(recipe, lora):
    path = recipe(**{"dataset.eval_size": 4})
    out = lora("check", path).out
    for word in ("weights", "adapters", "optimizer", "activations", "logits", "temporaries", "peak", "evaluating"):
        assert word in out
    found = lora("check", path, "--json").json["memory"]
    assert found["weights"] == 4 * FROZEN + BUFFERS
    assert found["total"] >= found["process"] + found["weights"]
    assert found["fits"] is True


def test_a_model_that_asks_for_values_is_guessed_and_says_so(recipe, lora):
    """Experts are chosen by value. The guess is of the size of what can be counted."""
    experts = {"model_type": "mixtral", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48}
    experts |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    path = recipe()
    tokenizer = load_recipe(path).recipe.model.path
    model = f"model={json.dumps({'config': experts, 'tokenizer': tokenizer, 'dtype': 'float32'})}"
    found = lora("check", path, model, "--json").json["memory"]
    assert found["estimated"] == BY_SIZES
    assert found["activations"] > memory(path).activations / 2
    counted = planner(path)
    rows = counted.plan.steps.largest_micro_batch(counted.plan.dataset.train, 4, counted.network.layout)
    assert 1 <= counted._guess(rows, False).kept / counted.memory().activations < 2, "as if nothing were fused"


def test_states_kept_in_memory_are_planned_and_those_on_disk_are_not(recipe):
    changes = ["lora.layers_to_transform=[1]", "training.cache_frozen_layers=none"]
    found = {}
    for where in ("none", "memory", "disk"):
        changes[1] = f"training.cache_frozen_layers={where}"
        found[where] = planner(recipe(), *changes)
    dataset = found["none"].plan.dataset
    unlike = {row.input_ids.tobytes(): len(row.input_ids) for row in [*dataset.train, *dataset.eval]}
    tokens = sum(unlike.values())
    plans = {where: each.memory() for where, each in found.items()}
    assert plans["memory"].cached == tokens * HIDDEN * 4
    assert plans["none"].cached == plans["disk"].cached == 0
    assert plans["memory"].resident - plans["memory"].process == (
        plans["none"].resident - plans["none"].process + plans["memory"].cached
    )


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_with_fsdp_a_process_holds_its_part_of_the_layers_and_two_of_them_whole(dtype, size, recipe):
    """On the CPU beside the files that are mapped, if they are of that type: float32."""

    def plan_for(processes: int, strategy: str) -> MemoryPlan:
        loaded = load_recipe(recipe(), [f"training.strategy={strategy}", f"model.dtype={dtype}"])
        return MemoryPlanner(make_plan(loaded, world=World(size=processes, local_size=processes))).memory()

    alone, pieces = plan_for(4, "ddp"), plan_for(4, "fsdp")
    layer = size * (sum(i * o for i, o in SHAPES) + 2 * HIDDEN)
    saved = LAYERS * layer * 3 // 4 - (LAYERS * layer if dtype == "float32" else 0)
    assert alone.weights - pieces.weights == saved
    assert (alone.gathered, pieces.gathered) == (0, 2 * layer)
    whole, cut = (plan.training - plan.heap - plan.process for plan in (alone, pieces))
    assert cut == whole - saved + 2 * layer
    assert pieces.loading - pieces.process == alone.loading - alone.process, "each process maps all of the base's files"
    assert plan_for(1, "fsdp").weights == alone.weights, "a single process shards nothing"

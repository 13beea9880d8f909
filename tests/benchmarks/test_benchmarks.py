"""The benchmark program counts, divides and prints rightly. Nothing here is timed."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch

from lora_cli.fusion import forms
from tests.benchmarks import limit, shapes
from tests.benchmarks.__main__ import main
from tests.benchmarks.bases import save_base
from tests.benchmarks.contenders import ABLATIONS, CONTENDERS, changes
from tests.benchmarks.contenders.job import Job
from tests.benchmarks.contenders.trainer import trainer_row
from tests.benchmarks.figures import Spread, ratios
from tests.benchmarks.memory import process_peak_bytes, resident_bytes
from tests.benchmarks.processes import Failed, run
from tests.benchmarks.products import (
    WITH_SMALLER,
    attention_flops,
    card_peak,
    model_flops_per_token,
    product_flops,
    products,
)
from tests.benchmarks.shapes import RANK, SHAPES, Row, Shape
from tests.benchmarks.smaller import Small, smaller_products
from tests.benchmarks.table import markdown, put_between_marks

MICRO = replace(SHAPES["micro"], steps=1)
MICRO_ENCODER = replace(
    SHAPES["encoder-sst2"],
    config=shapes.ENCODER
    | {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    rows_per_step=2,
    steps=1,
    longest=12,
    usual=8,
)
KINDS = {"causal_lm": MICRO, "sequence_classification": MICRO_ENCODER, "top layer": replace(MICRO, top=1)}


def test_a_median_has_its_least_and_most():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([4.0, 1.0, 2.0, 3.0]).median == 2.5
    assert Spread.of([1234.4, 1000.0, 1500.6]).text(0) == "1,234 (1,000-1,501)"
    assert Spread.of([0.5]).text() == "0.50", "one round has no spread"


def test_ratios_are_of_the_same_round():
    """A slow second round slows both; the ratio of the medians apart would be 2.5."""
    assert ratios([10.0, 4.0, 30.0], [5.0, 1.0, 4.0]) == [2.0, 4.0, 7.5]
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])


def test_the_limit_counts_the_products_of_a_llama_step():
    """2 N P forward and as much backward, less the first layer's q, k, v; at supervised positions the head, and the
    last layer but for its keys and values."""
    c, rows = MICRO.config, [Row(list(range(10))), Row(list(range(7)))]
    hidden, inner, kv, layers = 32, 64, 16, c["num_hidden_layers"]
    first = hidden * (hidden + 2 * kv)
    layer = first + hidden * hidden + 3 * hidden * inner
    tokens, targets = 17, 5 + 4
    below = 2 * tokens * (2 * (layers - 1) * layer - first)
    last = 4 * tokens * 2 * kv * hidden + 4 * targets * (layer - 2 * kv * hidden)
    assert product_flops(MICRO, rows) == below + last + 4 * targets * c["vocab_size"] * hidden


def test_the_limit_counts_the_products_of_an_encoder_step():
    rows = [Row([1] * 5, 0), Row([1] * 3, 1)]
    layer, keys_and_values = 4 * 32 * 32 + 2 * 32 * 48, 2 * 32 * 32
    first, last = 2 * 8 * (2 * layer - 3 * 32 * 32), 4 * 8 * keys_and_values + 4 * 2 * (layer - keys_and_values)
    assert product_flops(MICRO_ENCODER, rows) == first + last + 4 * 2 * 32 * 32


def test_the_smaller_products_are_three_there_and_three_back_of_each_adapter_and_of_attention():
    """6 N R (I + O) for each adapter, less what nobody below the first layer's q, k, v needs; half of all pairs."""
    rows = [Row(list(range(16))), Row(list(range(8)))]
    hidden, inner, kv, tokens, targets = 32, 64, 16, 24, 12
    qkv = [(hidden, hidden), (hidden, kv), (hidden, kv)]
    behind = [(hidden, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    first = 6 * tokens * RANK * sum(i + o for i, o in qkv + behind) - 2 * tokens * RANK * 3 * hidden
    last = 6 * RANK * (tokens * sum(i + o for i, o in qkv[1:]) + targets * sum(i + o for i, o in [qkv[0], *behind]))
    found = [product.flops for product in smaller_products(MICRO, rows)]
    assert sum(found) == first + last + attention_flops(MICRO, rows)
    assert attention_flops(MICRO_ENCODER, rows) < sum(p.flops for p in smaller_products(MICRO_ENCODER, rows))


def test_layers_below_the_adapters_have_no_adapters_and_attention_without_a_backward_pass():
    rows = [Row(list(range(16)))]
    top = replace(MICRO, top=1)
    below, both = smaller_products(top, rows), smaller_products(MICRO, rows)
    adapters = (1 + 3 * 3 + 1) + (1 + 3 + 2) + (1 + 2 * 3 + 2) + (1 + 3 + 2)  # q, k, v need no gradient of their input
    assert len(both) - len(below) == adapters + 4 + 2  # nor do those of the upper layer, of targets and of tokens
    assert below[:2] == [Small(2, 16, 8, 16), Small(2, 16, 16, 8)]


@pytest.mark.parametrize("name", SHAPES)
def test_the_products_are_the_models_matrices(name):
    """Every linear layer of the real model, built without weights, is one product; a classifier's classes are none."""
    from transformers import AutoConfig

    from lora_cli.models import empty_model

    shape = SHAPES[name]
    settings = {key: value for key, value in shape.config.items() if key != "model_type"}
    model = empty_model(AutoConfig.for_model(shape.config["model_type"], **settings), shape.task)
    linear = [m.weight.shape for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "classifier"]
    assert sorted((p.outputs, p.inputs) for p in products(shape)) == sorted(map(tuple, linear))


def test_attention_costs_six_products_of_all_pairs_or_of_half():
    rows = [Row([1] * 4), Row([1] * 2)]
    below, last = 8 + 2, 2 * 4 - 2 + 2 * 1 - 0.5  # two targets of four tokens see 3.5 each, up to half of themselves
    assert attention_flops(MICRO, rows) == 6 * 2 * 32 * (below + last)
    assert attention_flops(MICRO_ENCODER, rows) == 6 * 2 * 32 * (16 + 4 + 8 + 2)


def test_frozen_layers_below_the_adapters_need_no_backward_pass():
    """With the upper one of two layers adapted: the lower one forward only, the upper one's q, k, v too."""
    top, rows = replace(MICRO, top=1), [Row(list(range(10)))]
    layer, qkv = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64, 32 * (32 + 2 * 16)
    saved = 2 * 10 * (layer - qkv) + 2 * 10 * 2 * 16 * 32 + 2 * 5 * 32 * 32  # of the upper: k, v of all, q of 5 targets
    assert product_flops(MICRO, rows) - product_flops(top, rows) == saved
    assert attention_flops(MICRO, rows) - attention_flops(top, rows) == 4 * 32 * 10**2


def test_an_8b_model_needs_four_operations_a_parameter_and_token():
    """4 N over the layers, half of the head's as half is supervised, and the attention, a fraction of it."""
    layers, head = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336), 128256 * 4096
    ratio = model_flops_per_token(SHAPES["llama-8b"]) / (4 * layers + 2 * head)
    assert 1 < ratio < 1.1


def test_a_card_is_known_by_its_name():
    assert card_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert card_peak("NVIDIA H100 PCIe") == 756e12
    assert card_peak("NVIDIA L40S") != card_peak("NVIDIA L4")
    assert card_peak("cpu") is None


def test_the_limit_runs_and_agrees_with_its_own_count():
    found = limit.measure_limit(MICRO)
    tokens = sum(MICRO.lengths())
    per_token = found["flops_per_second"] / found["tokens_per_second"]
    assert per_token == pytest.approx(product_flops(MICRO, MICRO.rows()) / tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*CONTENDERS, *ABLATIONS])
def test_an_installed_contender_trains(name, kind, tmp_path, monkeypatch):
    contender, shape = (CONTENDERS | ABLATIONS)[name], KINDS[kind]
    if reason := contender.why_not(shape, cuda=torch.cuda.is_available()):
        pytest.skip(reason)
    monkeypatch.setattr("lora_cli.device.keep_freed_memory", lambda: True)  # not for all the tests that follow
    job = Job(save_base(shape, tmp_path / "base"), shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        contender.train()(job)
    figures = job.figures()
    assert figures.keys() == {"tokens_per_second", "step_seconds", "busy_cores", "peak_bytes", "above_base_bytes"}
    assert len(job.ticks) == 2, "the pass that warms up, and the one that is measured"
    assert figures["tokens_per_second"] * figures["step_seconds"] == pytest.approx(sum(shape.lengths()))
    assert figures["peak_bytes"] > figures["above_base_bytes"] >= 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ABLATIONS)
def test_a_change_is_measured_beside_ours(name, kind, tmp_path, monkeypatch):
    """Both take the same steps in turn, each as it is, and nothing of the change is left to the other."""
    contender, shape = ABLATIONS[name], KINDS[kind]
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # one generator draws for both
    shape = replace(shape, config=shape.config | no_dropout)
    if reason := contender.why_not(shape, cuda=torch.cuda.is_available()):
        pytest.skip(reason)
    changed = contender.train()
    if changed.alone:
        pytest.skip("holds for a whole process")
    monkeypatch.setattr("lora_cli.device.keep_freed_memory", lambda: True)
    took: list[float] = []
    monkeypatch.setattr(changes, "_seconds_of_one", lambda taken, job: took.append(next(taken).loss) or 1.0)
    before = forms.low_rank_linear, torch.get_float32_matmul_precision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert changed.beside_ours(Job(save_base(shape, tmp_path / "base"), shape)) == 1.0
    assert len(took) == 2 * changes.PASSES * shape.steps
    assert took[0::2] == pytest.approx(took[1::2], rel=1e-3), "the same losses"
    assert (forms.low_rank_linear, torch.get_float32_matmul_precision()) == before


def test_who_cannot_be_measured_is_told_why():
    why = {name: contender.why_not(SHAPES["long-context"], cuda=False) for name, contender in CONTENDERS.items()}
    assert why["lora"] is None
    assert why["peft+trainer+grouped"] == "the same: all rows have one length"
    assert why["peft+trainer+liger"] == why["unsloth"] == "not measured: no CUDA device"
    assert CONTENDERS["trl"].why_not(MICRO_ENCODER, cuda=False) == "does not train this task"
    missing = replace(CONTENDERS["trl"], modules=("no_such_module",))
    assert missing.why_not(MICRO, cuda=False) == "not installed"


def test_everyone_supervises_the_same_tokens():
    from tests.benchmarks.contenders.ours import _example

    row = Row([5, 6, 7, 8, 9])
    assert trainer_row(row)["labels"] == [-100, -100, 7, 8, 9]
    assert _example(row, "").supervised.tolist() == [False, False, True, True, True]
    assert _example(row, "").num_targets == row.num_targets == 3


def test_the_rows_are_the_same_each_time_and_within_the_shape():
    for shape in SHAPES.values():
        assert shape.lengths() == shape.lengths()
        assert shape.shortest <= min(shape.lengths()) <= max(shape.lengths()) <= shape.longest
        assert len(shape.lengths()) == shape.steps * shape.rows_per_step
    assert shapes.unavailable().keys() <= {"DoRA", "nf4 base"}


def test_a_peak_is_no_less_than_what_is_held():
    assert 0 < resident_bytes() <= process_peak_bytes()


def test_a_failed_process_says_why():
    with pytest.raises(Failed, match="ValueError: too / bad"):
        run("-c", "raise ValueError('too | bad')")
    with pytest.raises(Failed, match="ended by signal 9"):
        run("-c", "import os; os.kill(os.getpid(), 9)")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["instruct"], "unknown shape: instruct; known are"), (["--contenders", "axolotl"], "unknown contender: axolotl")],
)
def test_an_unknown_name_gives_one_line_with_those_known(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith(f"error: {words}")
    assert error.count("\n") == 1
    assert ("long-context" if "instruct" in arguments else "peft+trainer") in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["micro", "--json", "nowhere/found.json"], "error: --json nowhere/found.json: there is no folder nowhere"),
        (["--table", "nothing.json"], "error: there is no file nothing.json"),
        (["micro", "--into", "README.md"], "--into goes with --table"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_before_anything_is_measured(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


DOCUMENT = {
    "command": "bench small",
    "machine": {
        "cpu": "Some CPU",
        "cores": 2,
        "device": "cpu",
        "cuda": False,
        "load_before": 0.1,
        "versions": {"torch": "2.13.0", "trl": "not installed"},
    },
    "rounds": 3,
    "shapes": {
        "small": {
            "title": "a small one",
            "model_flops_per_token": 1e6,
            "limit": {"tokens_per_second": [200.0, 400.0, 300.0], "flops_per_second": [1e12, 2e12, 3e12]}
            | {WITH_SMALLER: [150.0, 200.0, 180.0]},
            "contenders": {
                "lora": {
                    "tokens_per_second": [100.0, 300.0, 240.0],
                    "peak_bytes": [2e9, 2e9, 2e9],
                    "above_base_bytes": [1e9, 1.5e9, 1.2e9],
                },
                "slow": {
                    "tokens_per_second": [50.0, 100.0, 60.0],
                    "peak_bytes": [4e9, 4e9, 5e9],
                    "above_base_bytes": [3e9, 3e9, 4e9],
                },
                "failing": "failed: it broke",
                "trl": "not installed",
            },
            "ablations": {"lora, no fused forms": {"tokens_per_second": [80.0, 150.0, 120.0], "peak_bytes": [3e9] * 3}},
        },
        "huge": {"title": "a huge one", "model_flops_per_token": 1e9, "missing": "not measured: no CUDA device"},
    },
    "other": {"`lora --help`": ["s", [0.06, 0.05, 0.07]], "merging": "failed: no space"},
    "unavailable": {"DoRA": "not available in this version"},
}
EXPECTED = """\
`bench small`: Some CPU, 2 cores; torch 2.13.0; medians of 3 rounds, least and most in brackets.

**small: a small one**

| contender | real tokens/s | of the limit | lora is faster by | peak GB | above the base GB |
| --- | ---: | ---: | ---: | ---: | ---: |
| lora | 240 (100-300) | 75 (50-80) % |  | 2.00 | 1.20 (1.00-1.50) |
| slow | 60 (50-100) | 25 (20-25) % | 3.00 (2.00-4.00) x | 4.00 (4.00-5.00) | 3.00 (3.00-4.00) |
| failing | failed: it broke |  |  |  |  |
| trl | not installed |  |  |  |  |
| the limit: matrix products alone | 300 (200-400) | 2.00 (1.00-3.00) TFLOP/s |  |  |  |
| the same, and the products of adapters and attention | 180 (150-200) | 60 (50-75) % |  |  |  |

**small: ours with one thing changed**

| the change | real tokens/s | lora is faster by | peak GB |
| --- | ---: | ---: | ---: |
| lora | 240 (100-300) |  | 2.00 |
| lora, no fused forms | 120 (80-150) | 2.00 (1.25-2.00) x | 3.00 |

**Other work**

| what | unit | median (least-most) |
| --- | --- | --- |
| `lora --help` | s | 0.06 (0.05-0.07) |
| merging |  | failed: no space |

**Not in these tables**

| what | why |
| --- | --- |
| huge | not measured: no CUDA device |
| DoRA | not available in this version |"""


def test_the_tables_of_a_small_document():
    assert markdown([DOCUMENT]) == EXPECTED


def test_a_machine_that_was_not_quiet_is_told():
    busy = DOCUMENT | {"machine": DOCUMENT["machine"] | {"load_before": 3.2}}
    assert "Others were at work (load 3.2): doubtful." in markdown([busy])


def test_utilisation_is_shown_on_a_card_only_and_not_guessed_for_an_unknown_one():
    on_card = json.loads(json.dumps(DOCUMENT))
    on_card["machine"] |= {"cuda": True, "device": "NVIDIA H100 80GB HBM3"}
    assert "| FLOP utilisation |" in markdown([on_card])
    assert "| 0.0 % |" in markdown([on_card])
    on_card["machine"]["device"] = "Card of the future"
    assert "| unknown card |" in markdown([on_card])


def test_a_table_of_files_is_printed_or_put_between_its_marks(tmp_path, capsys):
    measured, readme = tmp_path / "measured.json", tmp_path / "README.md"
    measured.write_text(json.dumps(DOCUMENT), encoding="utf-8")
    main(["--table", str(measured)])
    assert capsys.readouterr().out == EXPECTED + "\n"
    readme.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n", encoding="utf-8")
    main(["--table", str(measured), "--into", str(readme)])
    assert readme.read_text(encoding="utf-8") == f"before\n<!-- bench -->\n{EXPECTED}\n<!-- /bench -->\nafter\n"
    readme.write_text("no marks", encoding="utf-8")
    with pytest.raises(SystemExit, match="has no <!-- bench -->"):
        put_between_marks(readme, "x")


def test_every_shape_names_a_dtype_and_a_task():
    for shape in SHAPES.values():
        assert isinstance(shape, Shape) and isinstance(getattr(torch, shape.dtype), torch.dtype)

"""Liger's kernels against the formulas in whose places they stand: interpreted, since compiled they need a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.ops import liger
from lora_cli.ops.kernels import Kernels, kernel
from tests.ops.formulas import FORMULAS

LIMITS = {"float32": 1e-6, "float16": 1e-3}
ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def interpreted(*kinds: str) -> dict[str, Any]:
    """What ``interpreted.py`` prints, in a process of its own: Triton decides once whether it compiles."""
    if not (find_spec("triton") and find_spec("liger_kernel")):
        pytest.skip("liger-kernel is not installed")
    command = [sys.executable, "-m", "tests.ops.interpreted", *kinds]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_every_formula_with_kernels_has_one_of_liger_s():
    assert liger.KERNELS.keys() == FORMULAS.keys()
    for name, formula in FORMULAS.items():
        assert kernel(formula, Kernels.LIGER) is liger.KERNELS[name]
        assert kernel(formula, Kernels.PLAIN) is formula


def test_each_gives_what_its_formula_does_and_writes_where_that_writes():
    formulas = interpreted()["formulas"]
    assert {label.split(",")[0] for label in formulas} == FORMULAS.keys()
    for label, error in formulas.items():
        assert error < LIMITS[label.rsplit(", ", 1)[1]], label


@pytest.mark.slow
def test_models_that_run_by_them_have_the_same_loss_and_gradients():
    """Llama; Gemma 2 with an offset, gelu and a cap; Granite with scaled logits."""
    models = interpreted("llama", "gemma2", "granite")["models"]
    for kind, found in models.items():
        assert found["error"] < 1e-5, kind
        assert found["forms"] == ["attention", "gated", "norm"], kind
        lasting, *notes = found["notes"]
        assert lasting == "element-wise work is not compiled: not tried"
        unscaled = ([], "liger")
        scaled = (["the loss is not Liger's: Liger's loss scales no logits"], "plain")
        assert (notes, found["loss"]) == (scaled if kind == "granite" else unscaled), kind


def test_the_extra_asks_for_the_versions_that_are_taken():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert extras["liger"] == [f"liger-kernel{liger.VERSIONS}"]


def test_what_it_has_no_kernel_for_is_said():
    x = torch.zeros(2, 4)
    with pytest.raises(NotImplementedError, match="no kernel of gelu"):
        liger.inner(x, x, torch.nn.functional.gelu)
    with pytest.raises(NotImplementedError, match="scales no logits"):
        liger.losses_and_gradient(x, torch.zeros(2, dtype=torch.int64), 0.5, None)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ("0.8.5", None),
        ("0.8.12.dev0", None),
        ("0.8.4", "needs liger-kernel >=0.8.5,<0.9, and 0.8.4 is installed"),
        ("0.9.0", "needs liger-kernel >=0.8.5,<0.9, and 0.9.0 is installed"),
        ("1.0", "and 1.0 is installed"),
        (None, "which are not installed"),
    ],
)
def test_on_cuda_it_is_refused_where_it_is_not_installed_or_another_series(found, words, monkeypatch):
    def version(name: str) -> str:
        if found is None:
            raise liger.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(liger, "version", version)
    refusal = liger.why_not_here(CUDA)
    if words is None:
        assert refusal is None
    else:
        reason, cure = refusal
        assert words in reason
        assert cure == "pip install 'lora-cli[liger]'"


def test_on_the_cpu_it_is_refused_by_name(recipe, lora):
    refused = lora("check", recipe(**{"training.use_liger_kernel": True}))
    assert refused.code == 2
    assert "training.use_liger_kernel is for CUDA, and this run is on cpu" in refused.err
    assert liger.why_not_here(CPU) is not None


@pytest.mark.gpu
def test_on_a_gpu_a_run_takes_them(recipe, lora):
    pytest.importorskip("liger_kernel")
    path = recipe(**{"training.use_cpu": False, "model.dtype": "bfloat16", "training.use_liger_kernel": True})
    result = lora("train", path)
    assert result.code == 0, result.err
    assert "Liger" not in result.out, "no note says what is not used"

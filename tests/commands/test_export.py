"""`lora export`: what a server reads is what was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_cli.adapters.exporting import export_update
from lora_cli.adapters.files import read_adapter
from lora_cli.adapters.servers import SERVERS
from lora_cli.commands import export as command
from lora_cli.commands.export import serve_commands
from tests.adapters.test_spectrum import dense, made
from tests.commands.test_inspect import edited
from tests.made import base_model, distance, loaded_by_peft, logits, other_weights, our_adapter, peft_adapter

SAME, DIFFERENT = 1e-5, 1e-2
KEYS = {"use_rslora": True, "lora_alpha": 5.0, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 7.0}}


def exported(lora, folder: Path, server: str, *options: object) -> dict:
    result = lora("export", folder, "--for", server, "-o", folder.with_name("out"), "--json", *options)
    assert result.code == 0, result.err
    return result.json


def naive_logits(base: Path, folder: Path, scale: float) -> torch.Tensor:
    """The logits of a reader that knows tensors and one scale, and nothing else of the configuration."""
    model = base_model(base, "causal_lm")
    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name, a_RI in tensors.items():
            if name.endswith("lora_A.weight"):
                b_OR = tensors[name.replace("lora_A", "lora_B")]
                weight = model.get_submodule(
                    name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                ).weight
                weight += scale * b_OR.float() @ a_RI.float()
    return logits(model)


@pytest.mark.parametrize("server", SERVERS)
def test_a_reader_that_knows_one_scale_only_gives_the_trained_logits(server, tmp_path, model_folder, lora):
    base = model_folder("llama")
    expected = logits(our_adapter(base, tmp_path / "adapter", "causal_lm", **KEYS))
    report = exported(lora, tmp_path / "adapter", server, "--dtype", "float32")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == report["rank"] == 4
    assert not {"use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "modules_to_save"} & config.keys()
    shapes = {t.shape[0] for n, t in load_file(tmp_path / "out" / "adapter_model.safetensors").items() if "lora_A" in n}
    assert shapes == {4}
    assert distance(naive_logits(base, tmp_path / "out", 1.0), expected) < SAME
    assert distance(logits(loaded_by_peft(base, tmp_path / "out", "causal_lm")), expected) < SAME
    assert distance(naive_logits(base, tmp_path / "adapter", 5 / 4), expected) > DIFFERENT  # unexported: the control
    assert report["not_compared"] is None
    assert report["agreement"]["max_abs_difference"] < SAME


def test_scales_that_are_powers_of_two_in_float32_lose_nothing(tmp_path, model_folder, lora):
    our_adapter(model_folder("llama"), tmp_path / "adapter", "causal_lm", lora_alpha=16.0)  # scale 4
    report = exported(lora, tmp_path / "adapter", "vllm", "--dtype", "float32")
    assert report["agreement"]["max_abs_difference"] == 0
    assert report["agreement"]["mean_kl"] == 0
    assert report["distance"] < 1e-15
    assert report["adapter_mean_kl"] > 1e-3


@pytest.mark.parametrize(("dtype", "digits"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_rounding_is_measured_and_within_the_type(dtype, digits, tmp_path, model_folder, lora):
    our_adapter(model_folder("llama"), tmp_path / "adapter", "causal_lm", **KEYS)
    report = exported(lora, tmp_path / "adapter", "vllm", "--dtype", dtype)
    before, after = (read_adapter(tmp_path / name).updates for name in ("adapter", "out"))
    off = torch.stack([(dense(after[n]) - dense(before[n])).norm() for n in before]).norm()
    norm = torch.stack([dense(update).norm() for update in before.values()]).norm()
    assert report["distance"] == pytest.approx(float(off / norm), rel=1e-6)
    assert 0 < report["distance"] < 2 * digits
    assert 0 < report["agreement"]["max_abs_difference"] < 0.1
    assert {t.dtype for u in after.values() for t in u.tensors.values()} == {getattr(torch, dtype)}


def test_bfloat16_is_the_default_and_the_folder_stands_beside_the_adapter(tmp_path, model_folder, lora):
    our_adapter(model_folder("llama"), tmp_path / "adapter", "causal_lm")
    result = lora("export", tmp_path / "adapter", "--for", "llama.cpp", "--no-verify")
    assert result.code == 0, result.err
    assert {t.dtype for t in load_file(tmp_path / "adapter-llama.cpp" / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }
    assert "logits    not compared: --no-verify" in result.out
    assert f"--outfile {tmp_path}/adapter-llama.cpp/adapter-llama.cpp.gguf {tmp_path}/adapter-llama.cpp" in result.out
    assert "llama-server -m BASE.gguf --lora" in result.out


@pytest.mark.parametrize("scaling", [0.5, 4.0, -2.0])
def test_padding_and_folding_change_no_number_for_powers_of_two(scaling):
    update = made(4, 20, 30, scaling=scaling)
    found = export_update(update, 7, torch.float32)
    assert found.lora_A.shape == (7, 20)
    assert found.lora_B.shape == (30, 7)
    assert not found.lora_A[4:].any()
    assert not found.lora_B[:, 4:].any()
    assert torch.equal(dense(found), dense(update))


def test_a_conv1d_adapter_of_peft_goes_through(tmp_path, model_folder, lora):
    base = model_folder("gpt2")
    expected = logits(peft_adapter(base, tmp_path / "adapter", "causal_lm", fan_in_fan_out=True, use_rslora=True))
    exported(lora, tmp_path / "adapter", "peft", "--dtype", "float32")
    assert distance(logits(loaded_by_peft(base, tmp_path / "out", "causal_lm")), expected) < SAME


def test_targets_given_as_an_expression_become_a_list(tmp_path, model_folder, lora):
    base = model_folder("llama")
    expected = logits(peft_adapter(base, tmp_path / "adapter", "causal_lm", target_modules=r".*\.1\..*q_proj"))
    exported(lora, tmp_path / "adapter", "vllm", "--dtype", "float32")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert distance(logits(loaded_by_peft(base, tmp_path / "out", "causal_lm")), expected) < SAME


def test_without_the_base_it_is_written_and_said_to_be_not_compared(tmp_path, model_folder, lora):
    base = shutil.copytree(model_folder("llama"), tmp_path / "base")
    our_adapter(base, tmp_path / "adapter", "causal_lm")
    shutil.rmtree(base)
    result = lora("export", tmp_path / "adapter", "--for", "sglang")
    assert result.code == 0, result.err
    assert f"not compared: the base {base} is not on this machine; name its folder with --base" in result.out
    shutil.rmtree(tmp_path / "adapter-sglang")
    found = exported(lora, tmp_path / "adapter", "sglang", "--base", model_folder("llama"))
    assert found["agreement"]["positions"] > 0


def test_a_base_that_was_named_must_be_there_and_be_the_right_one(tmp_path, model_folder, lora):
    base = model_folder("llama")
    our_adapter(base, tmp_path / "adapter", "causal_lm")
    other = other_weights(base, tmp_path / "other", "causal_lm")
    for name, message in ((tmp_path / "gone", "there is no folder"), (other, "is not the base that")):
        result = lora("export", tmp_path / "adapter", "--for", "vllm", "--base", name, "-o", tmp_path / "out")
        assert result.code == 2
        assert message in result.err
        assert not (tmp_path / "out").exists()


def test_a_hub_base_that_was_not_downloaded_is_not_asked_for(tmp_path, model_folder, lora, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(name, **keywords):
        asked.update(keywords)
        raise OSError("not cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    our_adapter(model_folder("llama"), tmp_path / "adapter", "causal_lm")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "some/model"}))
    report = exported(lora, tmp_path / "adapter", "vllm")
    assert report["not_compared"].startswith("the base some/model is not on this machine")
    assert asked["local_files_only"] is True


def test_what_is_more_than_low_rank_is_to_be_merged(tmp_path, model_folder, lora):
    base = model_folder("llama")
    our_adapter(base, tmp_path / "dora", "causal_lm", use_dora=True)
    our_adapter(base, tmp_path / "saved", "causal_lm", modules_to_save=["norm"])
    for name, message in (("dora", "is a DoRA adapter"), ("saved", "modules trained in full (model.norm)")):
        result = lora("export", tmp_path / name, "--for", "vllm", "-o", tmp_path / "out")
        assert result.code == 2
        assert message in result.err
        assert f"merge instead: lora merge {tmp_path / name}" in result.err
        assert not (tmp_path / "out").exists()


def test_biases_are_refused_by_name(tmp_path, model_folder, lora):
    our_adapter(model_folder("llama"), tmp_path / "adapter", "causal_lm")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bias": "lora_only"}))
    result = lora("export", tmp_path / "adapter", "--for", "vllm")
    assert result.code == 2
    assert "bias: lora_only" in result.err


def test_numbers_beyond_float16_are_refused(tmp_path, model_folder, lora):
    our_adapter(model_folder("llama"), tmp_path / "adapter", "causal_lm")
    edited(tmp_path / "adapter", lambda ts: ts["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"].fill_(6e4))
    result = lora("export", tmp_path / "adapter", "--for", "vllm", "--dtype", "float16", "--no-verify")
    assert result.code == 2
    assert "float16 cannot hold the numbers of 1 modules: model.layers.0.mlp.up_proj" in result.err
    assert not (tmp_path / "adapter-vllm").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--for", "tgi"), "--for tgi is not known"), (("--for", "vllm", "--dtype", "int8"), "--dtype int8 is not known")],
)
def test_unknown_servers_and_types_are_refused(options, message, tmp_path, lora):
    result = lora("export", tmp_path / "adapter", *options)
    assert result.code == 2
    assert message in result.err


def test_a_wrong_scale_leaves_no_folder(tmp_path, model_folder, lora, monkeypatch):
    """The proof's own control: double the update, and it is found out."""
    our_adapter(model_folder("llama"), tmp_path / "adapter", "causal_lm")
    honest = command.export_updates

    def doubled(updates, dtype):
        return {name: type(u)(2 * u.lora_A, u.lora_B, u.scaling) for name, u in honest(updates, dtype).items()}

    monkeypatch.setattr(command, "export_updates", doubled)
    result = lora("export", tmp_path / "adapter", "--for", "vllm")
    assert result.code == 5
    assert "the exported adapter is not the trained one" in result.err
    assert not (tmp_path / "adapter-vllm").exists()


def test_a_file_that_the_server_would_misread_leaves_no_folder(tmp_path, model_folder, lora, monkeypatch):
    our_adapter(model_folder("llama"), tmp_path / "adapter", "causal_lm")
    honest = command.rewritten
    monkeypatch.setattr(command, "rewritten", lambda *a, **k: honest(*a, **k) | {"alpha_pattern": {"q_proj": 9}})
    result = lora("export", tmp_path / "adapter", "--for", "vllm", "--no-verify")
    assert result.code == 5
    assert "vllm would not read what was written (ignores alpha_pattern" in result.err
    assert not (tmp_path / "adapter-vllm").exists()


def test_the_command_for_each_server():
    folder = Path("runs/my adapter")
    assert serve_commands("vllm", "org/base", folder, 24) == [
        "vllm serve org/base --enable-lora --max-lora-rank 32 --lora-modules 'my adapter'='runs/my adapter'"
    ]
    assert serve_commands("sglang", "org/base", folder, 24) == [
        "python -m sglang.launch_server --model-path org/base --enable-lora --lora-paths 'my adapter'='runs/my adapter'"
    ]
    assert "from_pretrained('org/base'), 'runs/my adapter')" in serve_commands("peft", "org/base", folder, 24)[0]
    convert, serve = serve_commands("llama.cpp", "org/base", folder, 24)
    assert convert == "python convert_lora_to_gguf.py --outfile 'runs/my adapter/my adapter.gguf' 'runs/my adapter'"
    assert serve == "llama-server -m BASE.gguf --lora 'runs/my adapter/my adapter.gguf'"

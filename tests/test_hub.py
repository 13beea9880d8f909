"""Where a model's files are: folders, the hub's answers, and weight files."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from lora_cli.errors import StorageError, UsageError
from lora_cli.hub import model_folder, weight_files, weight_map


class Response:
    """What the hub's errors look at."""

    headers: dict[str, str] = {}  # noqa: RUF012
    request = None
    status_code = 404


@pytest.fixture
def hub(monkeypatch):
    """``hub(error)`` makes every download fail so; ``hub(path)`` makes it answer. Returns the calls."""

    def answer(with_: Exception | Path) -> list[tuple[tuple, dict]]:
        calls = []

        def snapshot_download(*arguments, **named):
            calls.append((arguments, named))
            if isinstance(with_, Exception):
                raise with_
            return str(with_)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    return answer


def test_a_folder_is_itself_and_has_no_commit(tmp_path, hub):
    calls = hub(RuntimeError("asked the hub"))
    found = model_folder(str(tmp_path))
    assert (found.path, found.commit) == (tmp_path, None)
    assert calls == []


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert model_folder("~/model").path == tmp_path / "model"


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.gguf").write_text("x")
    with pytest.raises(UsageError, match="is a file; a model is a folder or a hub id"):
        model_folder(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./model", "../model", "a/b/c", "~/x/y", "two words", ".hidden"])
def test_what_cannot_be_a_hub_id_is_a_missing_folder(name, hub):
    calls = hub(RuntimeError("asked the hub"))
    with pytest.raises(UsageError) as caught:
        model_folder(name)
    assert caught.value.message == f"there is no folder {name}"
    assert calls == []


def test_a_misspelt_folder_is_answered_with_the_near_one(tmp_path, hub, monkeypatch):
    (tmp_path / "models" / "tiny-llama").mkdir(parents=True)
    (tmp_path / "models" / "tiny-lama.txt").write_text("a file is no model")
    with pytest.raises(UsageError) as caught:
        model_folder(str(tmp_path / "models" / "tiny-lama"))
    assert caught.value.help == f"did you mean {tmp_path / 'models' / 'tiny-llama'}?"
    hub(errors.LocalEntryNotFoundError("offline"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        model_folder("models/tiny-lama")  # could be a hub id as well
    assert caught.value.help == "did you mean models/tiny-llama?"


def test_the_commit_of_a_download_is_recorded(tmp_path, hub):
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    calls = hub(snapshot)
    found = model_folder("org/model", "main")
    assert (found.path, found.commit) == (snapshot, "0123abc")
    [(arguments, named)] = calls
    assert (arguments, named["revision"]) == (("org/model",), "main")


def wanted(name: str, patterns: list[str]) -> bool:
    return bool(list(huggingface_hub.utils.filter_repo_objects([name], allow_patterns=patterns)))


@pytest.mark.parametrize(
    ("name", "small", "weights", "code"),
    [
        ("config.json", True, True, True),
        ("tokenizer.json", True, True, True),
        ("tokenizer.model", True, True, True),
        ("chat_template.jinja", True, True, True),
        ("vocab.txt", True, True, True),
        ("model.safetensors.index.json", True, True, True),
        ("model.safetensors", False, True, True),
        ("model-00001-of-00002.safetensors", False, True, True),
        ("consolidated.safetensors", False, False, False),
        ("pytorch_model.bin", False, False, False),
        ("model.gguf", False, False, False),
        ("modeling_evil.py", False, False, True),
    ],
)
def test_only_what_is_needed_is_downloaded(tmp_path, hub, name, small, weights, code):
    """No pickles, no weights where none are read, no code unless the flag allows it."""
    calls = hub(tmp_path)
    model_folder("org/model", weights=False)
    model_folder("org/model")
    model_folder("org/model", remote_code=True)
    assert [wanted(name, named["allow_patterns"]) for _, named in calls] == [small, weights, code]


@pytest.mark.parametrize(
    ("error", "message", "help"),
    [
        (
            errors.RepositoryNotFoundError("404", response=Response()),
            "there is no folder org/model, and the hub knows no such model",
            None,
        ),
        (
            errors.GatedRepoError("403", response=Response()),
            "org/model is gated on the hub",
            "accept its terms there, then run: hf auth login",
        ),
        (
            errors.RevisionNotFoundError("404", response=Response()),
            "org/model has no revision v2 on the hub",
            None,
        ),
        (
            errors.LocalEntryNotFoundError("Cannot find it.\nmore lines"),
            "there is no folder org/model, and the hub could not be reached for it (Cannot find it.)",
            "check the spelling, or download the model and give its folder",
        ),
        (
            errors.HfHubHTTPError("503 Server Error", response=Response()),
            "there is no folder org/model, and the hub could not be reached for it (503 Server Error)",
            "check the spelling, or download the model and give its folder",
        ),
        (
            errors.HFValidationError("bad id"),
            "there is no folder org/model, and the hub could not be reached for it (bad id)",
            "check the spelling, or download the model and give its folder",
        ),
        (
            errors.HTTPError("peer closed connection"),  # of the HTTP library: no OSError
            "there is no folder org/model, and the hub could not be reached for it (peer closed connection)",
            "check the spelling, or download the model and give its folder",
        ),
        (
            ConnectionError(),
            "there is no folder org/model, and the hub could not be reached for it (ConnectionError)",
            "check the spelling, or download the model and give its folder",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_says_is_told_plainly(hub, error, message, help):
    hub(error)
    with pytest.raises(UsageError) as caught:
        model_folder("org/model", "v2")
    assert caught.value.message == message
    assert caught.value.help == help
    assert caught.value.exit_code == 2


def test_a_disk_that_fills_up_while_downloading_is_a_storage_error(hub):
    hub(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(StorageError, match="cannot download org/model: No space left on device") as caught:
        model_folder("org/model")
    assert caught.value.exit_code == 5


def test_the_real_library_offline_is_told_plainly_too():
    with pytest.raises(UsageError, match=r"there is no folder no-such-org/no-such-model, and the hub could not be"):
        model_folder("no-such-org/no-such-model")


# weight files


def write_index(folder: Path, table: object) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return path


def test_a_single_file_and_shards_in_the_order_of_the_index(tmp_path):
    for name in ("b.safetensors", "a.safetensors"):
        save_file({"x": torch.ones(1)}, tmp_path / name)
    write_index(tmp_path, {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"})
    assert weight_files(tmp_path) == [tmp_path / "b.safetensors", tmp_path / "a.safetensors"]
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]  # as transformers chooses


def test_a_shard_that_is_missing_is_named(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors")
    write_index(tmp_path, {"x": "a.safetensors", "y": "b.safetensors", "z": "c.safetensors"})
    with pytest.raises(UsageError, match=r"lacks weight files named in its index: b.safetensors, c.safetensors$"):
        weight_files(tmp_path)


def test_pickles_alone_are_refused_with_the_reason(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(UsageError, match=r"holds pickled weights only \(pytorch_model.bin\)") as caught:
        weight_files(tmp_path)
    assert "a pickle can run code when it is read" in caught.value.help
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]  # beside safetensors they do no harm


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"holds no model.safetensors"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"x": 1}}', '{"weight_map": null}',
     '{"weight_map": {"x": "../other/model.safetensors"}}', '{"weight_map": {"x": "/etc/passwd"}}'],
)  # fmt: skip
def test_an_index_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="is not an index of weight files"):
        weight_map(path)

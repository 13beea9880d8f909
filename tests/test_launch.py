"""`lora train --nproc-per-node N`: processes started, signals passed on, and the exit code of the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_cli.errors import UsageError
from lora_cli.launch import VARIABLES, check_devices, check_launch, environment, exit_code, launched
from tests.processes import finish, printed, start
from tests.terminal import Terminal

HERE_ONLY = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_it_knows_whether_torchrun_started_it(monkeypatch):
    assert not launched()
    monkeypatch.setenv("MASTER_ADDR", "somewhere")  # clusters set it in every pod
    assert not launched()
    for name in VARIABLES:
        monkeypatch.setenv(name, "1")
    assert launched()


@pytest.mark.parametrize("missing", VARIABLES)
def test_half_of_torchruns_variables_are_refused_by_name(monkeypatch, missing, lora, recipe):
    for name in VARIABLES:
        if name != missing:
            monkeypatch.setenv(name, "1")
    result = lora("train", recipe())
    assert result.code == 2
    assert f"but {missing} is not" in result.err


@pytest.mark.parametrize("count", [0, -1])
def test_fewer_than_one_process_is_refused(lora, recipe, count):
    result = lora("train", recipe(), "--nproc-per-node", count)
    assert result.code == 2
    assert f"--nproc-per-node must be 1 or more, not {count}" in result.err


def test_under_torchrun_the_flag_is_refused(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "1")
    with pytest.raises(UsageError, match="started by torchrun already"):
        check_launch(2)


def test_more_processes_than_gpus_are_refused_where_gpus_are_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_devices(2, use_cpu=False)
    check_devices(3, use_cpu=True)
    with pytest.raises(UsageError, match="needs 3 CUDA devices, and there are 2"):
        check_devices(3, use_cpu=False)


def test_processes_share_the_cores_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("lora_cli.launch._cores", lambda: range(8))
    assert environment(1, 3, 5)["OMP_NUM_THREADS"] == "2"
    assert environment(1, 16, 5)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert environment(1, 3, 5)["OMP_NUM_THREADS"] == "7"


def test_a_recipe_mistake_is_told_before_anything_is_started(lora, recipe):
    result = lora("train", recipe(**{"training.num_epoch": 3}), "--nproc-per-node", 2)
    assert result.code == 2
    assert result.err.count("error:") == 1
    assert "did you mean num_train_epochs?" in result.err


def test_the_exit_code_and_the_one_message_come_from_the_processes(recipe, tmp_path):
    """And nothing of the machinery's own. Both processes find the base damaged."""
    path = recipe(**{"model.path": str(tmp_path / "model"), "model.tokenizer": None})
    (tmp_path / "model").mkdir()
    process = start(tmp_path, "train", path, "--nproc-per-node", 2, "--debug", variables=HERE_ONLY)
    assert finish(process) == 2
    told = [line for line in printed(tmp_path).splitlines() if not line.startswith((" ", "Traceback"))]
    assert sum("error:" in line for line in told) == 1
    assert printed(tmp_path).count("Traceback") == 1, "of the process that tells it"
    assert "elastic" not in printed(tmp_path)


@pytest.fixture
def started(recipe, tmp_path):
    """A long run of two processes that has taken its first steps."""
    path = recipe(**{"training.max_steps": 4000, "training.save_steps": 4000, "training.logging_steps": 20})
    process = start(tmp_path, "train", path, "--nproc-per-node", 2, variables=HERE_ONLY)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0)
    return process


def wait_until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def workers(process) -> list[int]:
    """Those of the launcher, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"lora_cli" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def runs(pid: int) -> bool:
    """It has not ended. Whoever it was left to may let its remains lie for a while."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def saved_steps(folder: Path) -> list[int]:
    return [json.loads(path.read_text())["step"] for path in (folder / "run" / "checkpoints").glob("*/state.json")]


@pytest.mark.parametrize(("sent", "stopped_by"), [("SIGINT", "SIGINT"), ("SIGHUP", "SIGTERM")])
def test_a_signal_to_the_launcher_stops_the_run_with_its_state_saved(started, sent, stopped_by, tmp_path):
    os.kill(started.pid, signal.Signals[sent])
    assert finish(started) == 128 + signal.Signals[stopped_by]
    assert f"stopped by {stopped_by} after step" in printed(tmp_path)
    (step,) = saved_steps(tmp_path)
    assert 0 < step < 4000


def test_a_terminal_that_is_closed_stops_the_run_with_its_state_saved(recipe, tmp_path):
    """Its processes hear SIGHUP, and can write to it no more."""
    path = recipe(**{"training.max_steps": 4000, "training.save_steps": 4000, "training.logging_steps": 20})
    terminal = Terminal("train", path, "--nproc-per-node", 2, folder=tmp_path, variables=HERE_ONLY)
    terminal.read_until(r"[1-9]\d+/4000")
    terminal.close()
    assert terminal.finish() == 128 + signal.SIGTERM
    (step,) = saved_steps(tmp_path)
    assert 10 <= step < 4000


def test_processes_whose_launcher_is_killed_save_and_leave(started, tmp_path):
    pids = workers(started)
    assert len(pids) == 2
    os.kill(started.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(runs, pids)))
    assert "stopped by SIGTERM after step" in printed(tmp_path)
    assert len(saved_steps(tmp_path)) == 1


def test_a_process_that_is_killed_ends_the_run_with_code_1(started, tmp_path):
    os.kill(workers(started)[1], signal.SIGKILL)
    assert finish(started) == 1
    assert saved_steps(tmp_path) == []


CODES: list[tuple[list[int], int]] = [
    ([], 0),
    ([6], 6),
    ([-9, 4], 4),
    ([130, 130], 130),
    ([-9], 1),
    ([-11], 1),
    ([-9, -15], 1),
    ([-15, -9], 1),
    ([-15], 143),
    ([-15, -15], 143),
]


@pytest.mark.parametrize(("codes", "expected"), CODES)
def test_the_exit_code_is_one_that_a_process_gave_by_itself_or_says_what_ended_it(codes, expected):
    assert exit_code(codes) == expected


def test_no_module_of_the_current_folder_takes_the_place_of_a_library(recipe, tmp_path):
    (tmp_path / "typer.py").write_text("raise SystemExit(77)")
    command = [sys.executable, "-P", "-m", "lora_cli", "train", str(recipe(**{"training.max_steps": 1}))]
    variables = {name: value for name, value in os.environ.items() if name not in VARIABLES} | HERE_ONLY
    run = subprocess.run([*command, "--nproc-per-node", "2"], cwd=tmp_path, env=variables, check=False)
    assert run.returncode == 0


ENDS_BADLY = """
import atexit, os, sys
from lora_cli.cli import main

class Late:
    def __del__(self):
        os.abort()

late = Late()  # as a thread of gloo's would: it goes when Python takes itself apart
atexit.register(lambda: print("the last word", end=""))
sys.argv = ["lora", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize(("arguments", "code", "said"), [(["--version"], 0, "lora "), (["trian"], 2, "")])
def test_a_process_of_several_does_not_wait_for_python_to_take_itself_apart(arguments, code, said):
    """What it has said is said, and what it promised for its end is done. Alone it ends as any program does."""
    command = [sys.executable, "-c", ENDS_BADLY, *arguments]
    of_several = os.environ | dict.fromkeys(VARIABLES, "1")
    run = subprocess.run(command, env=of_several, check=False, capture_output=True, text=True)
    assert run.returncode == code
    assert run.stdout.startswith(said)
    assert run.stdout.endswith("the last word")
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGABRT


@pytest.mark.slow
def test_the_real_torchrun_gives_the_run_that_the_flag_gives(recipe, tmp_path):
    path = str(recipe(**{"training.max_steps": 2}))
    variables = {name: value for name, value in os.environ.items() if name not in VARIABLES} | HERE_ONLY
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "lora_cli",
    ]
    for command in (torchrun, [sys.executable, "-m", "lora_cli"]):
        own = [] if command is torchrun else ["--nproc-per-node", "2"]
        folder = f"output_dir={tmp_path / str(len(command))}"
        assert subprocess.run([*command, "train", path, folder, *own], env=variables, check=False).returncode == 0
    one, other = (tmp_path / str(n) / "adapter" / "adapter_model.safetensors" for n in (len(torchrun), 3))
    assert one.read_bytes() == other.read_bytes()

"""The device, its dtype, and the many ways of running out of memory."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_cli import device
from lora_cli.device import (
    available_bytes,
    choose_device,
    choose_dtype,
    computes_bfloat16,
    memory_errors,
    peak_memory_bytes,
    process_bytes,
)
from lora_cli.errors import OutOfMemoryError

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 1), torch.device("mps")


@pytest.fixture
def machine(monkeypatch):
    """Pretend to have a GPU of a capability, or Apple's."""

    def pretend(*, cuda: tuple[int, int] | None = None, mps: bool = False, bf16_cpu: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16_cpu)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

    return pretend


@pytest.mark.parametrize(
    ("cuda", "mps", "use_cpu", "expected"),
    [
        ((8, 0), True, False, CUDA),
        (None, True, False, MPS),
        (None, False, False, CPU),
        ((8, 0), True, True, CPU),
        (None, True, True, CPU),
    ],
)
def test_cuda_then_mps_then_cpu_unless_the_cpu_is_asked_for(machine, cuda, mps, use_cpu, expected):
    machine(cuda=cuda, mps=mps)
    assert choose_device(use_cpu) == expected


@pytest.mark.parametrize(
    ("device", "cuda", "bf16_cpu", "expected"),
    [
        (CUDA, (8, 0), False, torch.bfloat16),
        (CUDA, (9, 0), False, torch.bfloat16),
        (CUDA, (7, 5), False, torch.float32),
        (MPS, None, True, torch.float32),
        (CPU, None, True, torch.bfloat16),
        (CPU, None, False, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_the_hardware_multiplies_it(machine, device, cuda, bf16_cpu, expected):
    machine(cuda=cuda, bf16_cpu=bf16_cpu)
    assert computes_bfloat16(device) is (expected == torch.bfloat16)
    assert choose_dtype("auto", device) == expected
    assert choose_dtype("auto", device, trains_all=True) == torch.float32


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_named_dtype_is_taken_as_it_is(machine, name):
    machine(bf16_cpu=True)
    assert choose_dtype(name, CPU) == choose_dtype(name, CPU, trains_all=True) == getattr(torch, name)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    ],
    ids=["cuda", "python", "cpu", "windows", "mps", "driver"],
)
def test_exhausted_memory_is_one_error_with_the_cure(error):
    with pytest.raises(OutOfMemoryError) as caught, memory_errors("use less"):
        raise error
    assert caught.value.exit_code == 4
    assert caught.value.message.startswith("out of memory")
    assert "\n" not in caught.value.message
    assert caught.value.help == "use less"


def test_the_cpus_own_refusal_is_recognised():
    """Not an invented text: an allocation that no machine can serve."""
    with pytest.raises(OutOfMemoryError), memory_errors("use less"):
        torch.empty(2**52, dtype=torch.float32)


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match="shapes"), memory_errors("use less"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_peak_memory_of_the_cpu_is_that_of_the_process_in_bytes():
    unit = 1 if sys.platform == "darwin" else 1024
    peak = peak_memory_bytes(CPU)
    assert peak == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    assert 50e6 < peak < 1e12  # torch alone takes more than 50 MB


def test_freed_memory_is_kept_where_the_c_library_can_and_left_alone_elsewhere(monkeypatch):
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        assert device.keep_freed_memory()

    def missing(name: str) -> None:
        raise OSError("libc.so.6: cannot open shared object file")

    monkeypatch.setattr(device.ctypes, "CDLL", missing)
    assert not device.keep_freed_memory()


GROWTH = """
import ctypes, sys
from lora_cli import device
device.KERNELS_KEPT = int(sys.argv[1])
device.keep_fewer_kernels()
import torch
class Use(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "a b c d mapped f g used i j".split()]
library = ctypes.CDLL("libc.so.6")
library.mallinfo2.restype = Use
def held():
    use = library.mallinfo2()
    return use.used + use.mapped
weight = torch.ones(64, 64, dtype=torch.bfloat16)
def multiply(tokens):
    torch.ones(tokens, 64, dtype=torch.bfloat16) @ weight
multiply(100)
before = held()
for tokens in range(101, 161):
    multiply(tokens)
print(held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks the GNU C library what is in use")
@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="the library makes no such products here")
def test_the_sizes_of_products_that_were_met_take_bounded_memory():
    """Sixty sizes: with sixteen kept, at most a third of what is held with a thousand."""

    def growth(kept: int) -> int:
        unset = {key: value for key, value in os.environ.items() if key not in device.KERNEL_CACHES}
        command = [sys.executable, "-c", GROWTH, str(kept)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True, env=unset).stdout)

    assert 3 * growth(16) <= growth(1024)


def test_who_sets_the_kernel_caches_is_obeyed(monkeypatch):
    first, second = device.KERNEL_CACHES
    monkeypatch.setenv(first, "7")
    monkeypatch.setenv(second, "")
    monkeypatch.delenv(second)
    device.keep_fewer_kernels()
    assert (os.environ[first], os.environ[second]) == ("7", str(device.KERNELS_KEPT))


def test_a_process_that_trains_is_prepared_for_both(monkeypatch):
    asked: list[str] = []
    for name in ("keep_freed_memory", "keep_fewer_kernels"):
        monkeypatch.setattr(device, name, lambda name=name: asked.append(name))
    device.prepare_for_training()
    assert sorted(asked) == ["keep_fewer_kernels", "keep_freed_memory"]


def test_the_process_is_as_large_as_what_it_holds():
    before = process_bytes()
    held = torch.ones(25_000_000)
    assert process_bytes() - before == pytest.approx(held.nbytes, rel=0.2)


def write_group(folder: Path, names: tuple[str, str], limit: str, used: int, stat: str | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (limit, str(used)), strict=True):
        (folder / name).write_text(f"{text}\n", encoding="ascii")
    if stat is not None:
        (folder / "memory.stat").write_text(stat, encoding="ascii")


SECOND = ("memory.max", "memory.current")
FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def test_free_memory_is_the_machines_or_what_the_tightest_control_group_leaves(monkeypatch, tmp_path):
    cpu, own = torch.device("cpu"), tmp_path / "own"
    monkeypatch.setattr(device, "CGROUPS", tmp_path)
    monkeypatch.setattr(device, "OWN_CGROUP", own)
    machine = available_bytes(cpu)
    assert machine is not None
    assert machine > 10**7
    write_group(tmp_path, SECOND, "5000000", 1_000_000)
    assert available_bytes(cpu) == 4_000_000, "a container's own group is its root"
    own.write_text("0::/slurm/job_7/step_0\n", encoding="ascii")
    write_group(tmp_path / "slurm" / "job_7", SECOND, "3000000", 1_000_000)
    write_group(tmp_path / "slurm" / "job_7" / "step_0", SECOND, "max", 1_000_000)
    assert available_bytes(cpu) == 2_000_000, "a batch system limits the job, and not its steps"
    write_group(tmp_path / "slurm" / "job_7", SECOND, "3000000", 1_000_000, "anon 5\ninactive_file 400000\n")
    assert available_bytes(cpu) == 2_400_000
    own.write_text("9:cpu:/elsewhere\n4:memory:/job\n", encoding="ascii")
    stat = "inactive_file 7\ntotal_inactive_file 100000\n"
    write_group(tmp_path / "memory" / "job", FIRST, "1500000", 1_000_000, stat)
    assert available_bytes(cpu) == 600_000
    write_group(tmp_path, SECOND, "max", 0)
    write_group(tmp_path / "memory" / "job", FIRST, str(2**63 - 4096), 0)
    assert available_bytes(cpu) > 10**7


def test_mps_does_not_tell_its_memory():
    assert available_bytes(torch.device("mps")) is None

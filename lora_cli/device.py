"""The device a run computes on, and what it is good at."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lora_cli.errors import OutOfMemoryError


def choose_device(use_cpu: bool = False) -> torch.device:
    """cuda, then mps, then cpu."""
    if not use_cpu and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if not use_cpu and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def choose_dtype(name: str, device: torch.device, *, trains_all: bool = False) -> torch.dtype:
    """``auto`` is bfloat16 where the device multiplies it in hardware, else float32.

    Weights that are trained themselves stay float32: bfloat16's 8 bits would swallow their updates.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    return torch.bfloat16 if not trains_all and computes_bfloat16(device) else torch.float32


def computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def prepare_for_training() -> None:
    """What a process that trains tells the libraries below it, ahead of all work."""
    keep_freed_memory()
    keep_fewer_kernels()


def keep_freed_memory() -> bool:
    """Tell the C library to reuse freed memory instead of giving it back to the system; whether it understood.

    A training step frees what the next one takes again. glibc returns blocks of some megabytes each time, and
    the system clears every page anew: 5 to 8 % of a step on two cores. The peak stays what it was.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(mmap_threshold, 2**30) and libc.mallopt(trim_threshold, 2**31 - 1))
    except (OSError, AttributeError):  # another C library
        return False


KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and torch's in front of it
KERNELS_KEPT = 512  # 1024 if nobody says so; a step of a Llama takes about a hundred


def keep_fewer_kernels() -> None:
    """Bound what the CPU's library keeps of the sizes of products that it met: 0.6 MB each in two caches.

    Rows of any length bring new sizes in every step. To be called before the first product; who has set the caches'
    variables knows better.
    """
    for variable in KERNEL_CACHES:
        os.environ.setdefault(variable, str(KERNELS_KEPT))


def give_back_freed_memory() -> bool:
    """Give the system back what is freed now, whatever ``keep_freed_memory`` says of later; whether any was."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    try:
        return bool(ctypes.CDLL("libc.so.6").malloc_trim(0))
    except (OSError, AttributeError):  # another C library
        return False


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def process_bytes() -> int:
    """Memory that this process holds now; where the system does not tell, the most it has held."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return peak_memory_bytes(torch.device("cpu"))


def available_bytes(device: torch.device) -> int | None:
    """Memory that is still to be had; None where nobody tells.

    On the CPU the machine's, or what the control group of a container leaves, whichever is less.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = [value for value in (_machine_bytes(), *_group_bytes()) if value is not None]
    return min(found, default=None)


CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def _machine_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _group_bytes() -> Iterator[int]:
    """What each control group that this process is in leaves; ``max`` means that it has no limit."""
    for group, limit, used in _groups():
        try:
            most, held = (int((group / name).read_text(encoding="ascii")) for name in (limit, used))
        except (OSError, ValueError):
            continue
        yield max(0, most - held + _idle_bytes(group))


def _idle_bytes(group: Path) -> int:
    """What the system holds for a group of files that nobody has read lately: free for the asking."""
    try:
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}
    return found.get("total_inactive_file", found.get("inactive_file", 0))


def _groups() -> Iterator[tuple[Path, str, str]]:
    """This process's control groups and all around them, with the names of limit and use (``man 7 cgroups``).

    In a container its own group is mounted as the root, whatever path it has outside.
    """
    try:
        lines = [line.split(":", 2) for line in OWN_CGROUP.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        lines = []
    second = next((Path(path) for number, _, path in lines if number == "0"), Path("/"))
    first = next((Path(path) for _, controllers, path in lines if "memory" in controllers.split(",")), Path("/"))
    for path in (second, *second.parents):
        yield CGROUPS / path.relative_to("/"), "memory.max", "memory.current"
    for path in (first, *first.parents):
        yield CGROUPS / "memory" / path.relative_to("/"), "memory.limit_in_bytes", "memory.usage_in_bytes"


_EXHAUSTED = ("can't allocate memory", "not enough memory", "out of memory")  # torch's CPU allocators, drivers and mps


@contextmanager
def memory_errors(cure: str) -> Iterator[None]:
    """Turn the ways in which torch reports exhausted memory into one error that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(f"out of memory: {str(error).splitlines()[0]}", cure) from error
    except MemoryError as error:
        raise OutOfMemoryError("out of memory", cure) from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _EXHAUSTED):
            raise
        raise OutOfMemoryError(f"out of memory: {str(error).splitlines()[0]}", cure) from error

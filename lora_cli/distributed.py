"""The processes of one run, and the few things they say to each other.

Started by torchrun (or `--nproc-per-node`), which tells every process its rank. Without it a run is a world
of one, and nothing here costs anything.

An error that several processes may meet in the same place is agreed upon (``World.together``): one of them
tells it, the others leave with the same exit code. An error that only one meets (its memory is out) is
announced at the store where the processes met: the others may wait for it in a sum that it will never add to.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lora_cli.errors import LoraError, LostProcessError, ToldElsewhere, UsageError, exit_code_of, first_line

PATIENCE = timedelta(minutes=30)  # one process may read, evaluate or save while the others wait
# At the store: an exit code; how many met an error alone; that the message is on the screen.
ENDED, SPEAKERS, TOLD = "lora/ended", "lora/speakers", "lora/told"
WATCH_SECONDS = 0.5
GRACE_SECONDS = 5.0  # for a process to notice by itself that another one ended
LISTEN_SECONDS = 3.0  # for the word of a process whose connection broke
_BROKEN = ("Connection closed by peer", "Connection reset", "Broken pipe", "NCCL")
SAVE_SECONDS = 600.0  # for a run that was asked to stop to do so
TELL_SECONDS = 60.0  # for a message to be printed, and a crash log to be written


_WORKING_ALONE: ContextVar[bool] = ContextVar("working alone", default=False)  # inside World.together


@dataclass(frozen=True)
class World:
    """Who this process is among ``size`` of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on its own machine: which GPU it takes
    local_size: int = 1  # processes on this machine

    @property
    def is_main(self) -> bool:
        """Files are written, and words said, by one process alone."""
        return self.rank == 0

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            _check_all_come_here()
            dist.all_reduce(tensor)
        return tensor

    def spread(self, tensor: Tensor) -> Tensor:
        """The main process's values, in place."""
        if self.size > 1:
            _check_all_come_here()
            dist.broadcast(tensor, src=0)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every process's value (anything that JSON holds), by rank."""
        if self.size == 1:
            return [value]
        _check_all_come_here()
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(mine)]))
        longest = max(int(length) for length in lengths)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, torch.nn.functional.pad(mine, (0, longest - len(mine))))
        return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, lengths, strict=True)]

    def tell(self, value: Any) -> Any:
        """The main process's value (anything that JSON holds)."""
        return self.gather(value if self.is_main else None)[0]

    def take_device(self, use_cpu: bool) -> None:
        """Each process of a machine computes on a GPU of its own. Raises ``UsageError`` where there is none left."""
        if self.size == 1 or use_cpu:
            return
        if torch.backends.mps.is_available():
            raise UsageError("several processes cannot share Apple's GPU", "use training.use_cpu=true, or one process")
        if torch.cuda.is_available():
            devices = torch.cuda.device_count()
            if self.local_rank >= devices:
                raise UsageError(
                    f"process {self.local_rank + 1} of this machine finds {devices} CUDA devices",
                    "start as many processes as there are devices",
                )
            torch.cuda.set_device(self.local_rank)

    def wait(self) -> None:
        """Until every process has come this far."""
        if self.size > 1:
            self.add(torch.zeros(1))

    def any(self, here: bool) -> bool:
        """Whether it is so in one of the processes. No device is waited for."""
        return here if self.size == 1 else bool(self.add(torch.tensor(float(here))))

    @contextmanager
    def together(self) -> Iterator[None]:
        """A part of the run that all processes finish, or none does: the first of those that fail tells its error.

        In it each works for itself: in a sum, the others would wait for one that has failed.
        """
        if self.size == 1:
            yield
            return
        failure: BaseException | None = None
        inside = _WORKING_ALONE.set(True)
        try:
            yield
        except Exception as error:  # a bug, too, must not leave the others waiting
            failure = error
        finally:
            _WORKING_ALONE.reset(inside)
        codes = self.gather(exit_code_of(failure) if failure is not None else 0)
        if any(codes):
            speaker = next(rank for rank, code in enumerate(codes) if code)
            raise self._agreed(failure if speaker == self.rank else None, codes[speaker])

    def shared(self, error: LoraError) -> LoraError:
        """What this process raises for an error that all of them meet: the main one tells it."""
        if self.size == 1:
            return error
        agreed = self._agreed(error if self.is_main else None, error.exit_code)
        assert isinstance(agreed, LoraError)
        return agreed

    def _agreed(self, mine: BaseException | None, code: int) -> BaseException:
        if mine is None:
            return ToldElsewhere(code)
        mine.agreed = True  # type: ignore[attr-defined]
        return self.named(mine)

    def named(self, error: BaseException) -> BaseException:
        """Errors of other processes than the main one say whose they are."""
        if isinstance(error, LoraError) and not self.is_main:
            error.origin = f"process {self.rank} of {self.size}: "
        return error

    def check_same(self, facts: dict[str, Any]) -> None:
        """Raises ``UsageError`` where another process sees something else than the main one."""
        seen = self.gather(facts)
        main = seen[0]
        for rank, theirs in enumerate(seen):
            different = sorted(name for name in main.keys() | theirs.keys() if main.get(name) != theirs.get(name))
            if different:
                raise self.shared(
                    UsageError(
                        f"process {rank} of {self.size} sees something else than process 0: {', '.join(different)}",
                        "give every machine the same recipe, rows, model and kind of device",
                    )
                )


def _check_all_come_here() -> None:
    assert not _WORKING_ALONE.get(), "a sum of all processes inside a part that one of them may leave by failing"


ALONE = World()


@contextmanager
def joined() -> Iterator[World]:
    """Meet the other processes of the run, and leave together with them."""
    world = _world_of(os.environ)
    if world.size == 1:
        yield ALONE
        return
    store = _meet(world)
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(store.clone(), done), daemon=True)
    watcher.start()
    try:
        yield world
        world.wait()
        dist.destroy_process_group()
    except BaseException as error:
        raise _parting(error, world, store) from error
    finally:
        done.set()
        watcher.join(GRACE_SECONDS)  # a thread that asks the store while Python ends would bring the process down


def _world_of(variables: Any) -> World:
    try:
        rank, size, local = (int(variables[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except ValueError:
        raise UsageError("RANK, WORLD_SIZE and LOCAL_RANK in the environment must be whole numbers") from None
    if not 0 <= rank < size or local < 0:
        raise UsageError(f"RANK {rank} of WORLD_SIZE {size}, LOCAL_RANK {local}: that cannot be", "start with torchrun")
    return World(rank, size, local, int(variables.get("LOCAL_WORLD_SIZE") or size))


def _meet(world: World) -> Any:
    """Texts and figures travel by gloo, what lies on GPUs by NCCL."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        raise UsageError(
            f"process {world.rank} of {world.size} cannot meet the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: {first_line(error)}",
            "start all of them with torchrun",
        ) from error
    return store


def _watch(store: Any, done: threading.Event) -> None:
    """Leave when another process has ended: the main thread may wait for it in a kernel that never returns."""
    while not done.wait(WATCH_SECONDS):
        if _is_lost(store):  # with whoever started the processes: nobody is left to stop them
            if not done.wait(GRACE_SECONDS):
                os.kill(os.getpid(), signal.SIGTERM)
                if not done.wait(SAVE_SECONDS):  # the main thread waits for someone who is gone, too
                    os._exit(128 + signal.SIGTERM)
            return
        code = _ended(store)
        if code and not done.wait(GRACE_SECONDS):
            os._exit(code)


def _is_lost(store: Any) -> bool:
    try:
        store.check([ENDED])
    except RuntimeError:
        return True
    return False


def _ended(store: Any, seconds: float = 0.0) -> int:
    """The exit code of a process that ended by itself; 0 where none does so within these seconds."""
    last = time.monotonic() + seconds
    try:
        while not store.check([ENDED]):
            if time.monotonic() >= last:
                return 0
            time.sleep(0.05)
        return int(store.get(ENDED))
    except RuntimeError:  # the store went with its process
        return 0


def _parting(error: BaseException, world: World, store: Any) -> BaseException:
    """What to raise at the end of a run that failed, once the others know."""
    _ignore_sigterm()
    if isinstance(error, ToldElsewhere):
        _wait_until_told(store)
        return error
    if getattr(error, "agreed", False):
        atexit.register(_say, store, TOLD, "yes")  # the last thing that this process does
        return error
    # A sum that fails because another process has left is no error of this one.
    code = _ended(store, LISTEN_SECONDS) if isinstance(error, RuntimeError) else 0
    if not code and store.add(SPEAKERS, 1) > 1:
        code = _ended(store, LISTEN_SECONDS)
    if code:
        return ToldElsewhere(code)
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _BROKEN):
        error = LostProcessError(
            "another process of the run ended without a word",
            "the system ends processes for want of memory; the same command again goes on from the last checkpoint",
        )
    _say(store, ENDED, str(exit_code_of(error)))
    return world.named(error)


def _ignore_sigterm() -> None:
    """Whoever started the processes ends all when one has ended; this one is about to leave, with its own code."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _wait_until_told(store: Any) -> None:
    """Give the process that tells the error time to do so: torchrun ends it when the first one leaves."""
    try:
        store.wait([TOLD], timedelta(seconds=TELL_SECONDS))
    except RuntimeError:  # told or not, it is gone
        return


def _say(store: Any, key: str, value: str) -> None:
    with suppress(RuntimeError):  # whoever hosted the store is gone, and needs no word
        store.set(key, value)

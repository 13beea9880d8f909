"""What the processes of a run say to each other, and how they end."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from lora_cli import distributed
from lora_cli.distributed import ALONE, World, joined
from lora_cli.errors import DataError, LoraError, LostProcessError, StorageError, ToldElsewhere, UsageError
from tests.processes import Ranks


def talk(world: World) -> dict[str, object]:
    values = torch.arange(3.0) + world.rank
    return {
        "gathered": world.gather({"rank": world.rank, "text": "ä" * world.rank}),
        "told": world.tell(["main", None] if world.is_main else "other"),
        "sum": world.add(values.clone()).tolist(),
        "spread": world.spread(values.clone()).tolist(),
    }


def test_all_processes_hear_the_same():
    expected = {
        "gathered": [{"rank": 0, "text": ""}, {"rank": 1, "text": "ä"}, {"rank": 2, "text": "ää"}],
        "told": ["main", None],
        "sum": [3.0, 6.0, 9.0],
        "spread": [0.0, 1.0, 2.0],
    }
    assert Ranks(3).call(talk) == [expected] * 3


def test_a_process_alone_hears_itself():
    expected = {"gathered": [{"rank": 0, "text": ""}], "told": ["main", None]}
    assert talk(ALONE) == expected | {"sum": [0.0, 1.0, 2.0], "spread": [0.0, 1.0, 2.0]}


def fail_in(world: World, failing: list[int]) -> str:
    with world.together():
        if world.rank in failing:
            raise DataError(f"the rows of {world.rank} are bad")
    return "went on"


@pytest.mark.parametrize("failing", [[0, 1], [1], []])
def test_what_one_or_all_find_wrong_is_told_once_and_ends_all(failing):
    ranks = Ranks(2)
    results = ranks.call(fail_in, failing)
    if not failing:
        assert results == ["went on", "went on"]
        return
    speaker = failing[0]
    assert isinstance(results[speaker], DataError)
    assert results[speaker].origin == ("" if speaker == 0 else "process 1 of 2: ")
    assert isinstance(results[1 - speaker], ToldElsewhere)
    assert ranks.codes == [6, 6]


def add_together(world: World) -> None:
    with world.together():
        world.add(torch.zeros(2))


def test_no_sum_is_taken_inside_a_part_that_one_may_leave_by_failing():
    ranks = Ranks(2)
    main, other = ranks.call(add_together)
    assert isinstance(main, AssertionError)
    assert isinstance(other, ToldElsewhere)
    assert talk(ALONE), "and outside of one it is no longer refused"


def bug_in_one(world: World) -> None:
    with world.together():
        assert world.rank == 0, "a bug"


def test_a_bug_in_one_process_is_told_there_and_ends_all():
    ranks = Ranks(2)
    main, other = ranks.call(bug_in_one)
    assert isinstance(other, AssertionError)
    assert isinstance(main, ToldElsewhere)
    assert ranks.codes == [1, 1]


def fail_alone(world: World) -> None:
    if world.rank == 1:
        raise StorageError("full")
    world.add(torch.zeros(2))


def wait_for_ever(world: World) -> None:
    """Like a kernel that waits for a process which has left: no exception ever comes."""
    distributed.GRACE_SECONDS = 0.2
    if world.rank == 1:
        raise StorageError("full")
    time.sleep(60)


def test_an_error_that_one_process_meets_alone_ends_the_others_with_its_code():
    ranks = Ranks(2)
    main, other = ranks.call(fail_alone)
    assert isinstance(other, StorageError)
    assert isinstance(main, ToldElsewhere)
    assert ranks.codes == [5, 5]


def test_a_process_that_waits_in_vain_is_ended():
    ranks = Ranks(2)
    began = time.monotonic()
    assert ranks.call(wait_for_ever, seconds=30)[0] is None
    assert ranks.codes == [5, 5]
    assert time.monotonic() - began < 20


def be_killed(world: World) -> None:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.add(torch.zeros(2))


def test_a_process_that_is_killed_is_missed_by_the_others():
    ranks = Ranks(2)
    main, _ = ranks.call(be_killed)
    assert isinstance(main, LostProcessError)
    assert ranks.codes == [1, -signal.SIGKILL]


def see(world: World, facts: list[dict[str, str]]) -> None:
    world.check_same(facts[world.rank])


def test_processes_that_see_different_rows_are_refused():
    ranks = Ranks(2)
    main, other = ranks.call(see, [{"rows": "a", "base": "x"}, {"rows": "b", "base": "x"}])
    assert "process 1 of 2 sees something else than process 0: rows" in str(main)
    assert isinstance(other, ToldElsewhere)
    assert Ranks(2).call(see, [{"rows": "a"}, {"rows": "a"}]) == [None, None]


@pytest.mark.parametrize(
    ("rank", "size", "local", "message"),
    [("2", "2", "0", "RANK 2 of WORLD_SIZE 2"), ("0", "0", "0", "that cannot be"), ("one", "2", "0", "whole numbers")],
)
def test_impossible_ranks_are_refused(monkeypatch, rank, size, local, message):
    for name, value in {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LoraError, match=message), joined():
        pass


def test_a_process_that_torchrun_started_alone_is_alone(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with joined() as world:
        assert world is ALONE


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch):
    taken: list[int] = []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    World(5, 6, local_rank=1).take_device(use_cpu=False)
    World(5, 6, local_rank=1).take_device(use_cpu=True)
    ALONE.take_device(use_cpu=False)
    assert taken == [1]
    with pytest.raises(UsageError, match="process 3 of this machine finds 2 CUDA devices"):
        World(2, 6, local_rank=2).take_device(use_cpu=False)


def test_several_processes_do_not_share_apples_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UsageError, match="Apple"):
        World(0, 2).take_device(use_cpu=False)

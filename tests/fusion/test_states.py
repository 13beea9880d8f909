"""Where states are kept: what is put is what comes back, and nothing is left behind."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from lora_cli.data.encoding import Example
from lora_cli.errors import StorageError
from lora_cli.fusion.states import DiskStates, MemoryStates, key_of


def example(ids: list[int], where: str = "a") -> Example:
    return Example(np.array(ids, dtype=np.int32), np.zeros(len(ids), dtype=bool), where)


def test_a_row_is_known_by_its_tokens():
    assert key_of(example([1, 2])) == key_of(example([1, 2], "b"))
    assert len({key_of(example(ids)) for ids in ([1, 2], [2, 1], [1], [1, 2, 0])}) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_what_is_put_comes_back_in_any_order(kind, dtype, tmp_path):
    states = MemoryStates() if kind == "memory" else DiskStates(tmp_path)
    rows = {bytes([n]): torch.randn(n + 1, 5).to(dtype) for n in range(20)}
    for key, row in rows.items():
        assert key not in states
        states.put(key, row)
        assert key in states
        assert torch.equal(states.get(key), row)
    for key in reversed(rows):
        assert torch.equal(states.get(key), rows[key])


def test_a_row_that_is_a_part_of_a_batch_is_put_as_a_row(tmp_path):
    batch = torch.randn(2, 3, 4)
    for states in (MemoryStates(), DiskStates(tmp_path)):
        states.put(b"a", batch[1, :2])
        assert torch.equal(states.get(b"a"), batch[1, :2])
        assert states.get(b"a").untyped_storage().nbytes() == 2 * 4 * 4


def test_the_file_has_no_name_and_is_closed_with_its_owner(tmp_path):
    states = DiskStates(tmp_path)
    states.put(b"a", torch.ones(3, 4))
    assert list(tmp_path.iterdir()) == []
    file = states._file
    del states
    gc.collect()
    assert file.closed


def test_a_full_disk_is_an_error_that_names_the_folder():
    states = DiskStates.__new__(DiskStates)
    from pathlib import Path

    states._folder, states._places, states._end = Path("runs/x"), {}, 0
    states._file = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(StorageError, match="cannot write runs/x: No space left on device"):
        states.put(b"a", torch.ones(300, 400))
    assert b"a" not in states
    states._file.detach().close()

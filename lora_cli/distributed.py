"""The processes of one run, and the few things they say to each other.

Started by torchrun, which tells every process its rank. Without it a run is a world of one, and nothing here
costs anything.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """Who this process is among ``size`` of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on its own machine: which GPU it takes

    @property
    def is_main(self) -> bool:
        """Files are written, and words said, by one process alone."""
        return self.rank == 0

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64, device=_carrier())
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor.item())

    def wait(self) -> None:
        """Until every process has come this far."""
        if self.size > 1:
            dist.barrier()


ALONE = World()


def _carrier() -> torch.device:
    """Where a tensor has to be for the processes to exchange it."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def launched() -> bool:
    """Whether torchrun (or something that speaks like it) started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()

"""One process or many, as torchrun starts them. A process on its own is process 0 of 1; for it these
functions do nothing.
"""

import contextlib
import datetime
import os

import torch
from torch import distributed as dist

RANK, LOCAL_RANK, WORLD = (int(os.environ[name]) if dist.is_torchelastic_launched() else alone
                           for name, alone in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


@contextlib.contextmanager
def process_group():
    """Join the other processes; leave them at the end of the `with` block."""
    if WORLD > 1:  # a day, because one process may decode images for hours while the others wait
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                timeout=datetime.timedelta(days=1))
    yield  # after an error the process ends without cleaning up, see cli.run_script
    if WORLD > 1:
        dist.destroy_process_group()


def shard(n):
    """This process's part of a batch of n images → a slice of the batch, the number of images it counts for.

    Every process has to take part in a step. So if there are more processes than images, a process without an
    image of its own computes the first one with weight 0.
    """
    return (slice(RANK, None, WORLD) if RANK < n else slice(0, 1)), len(range(RANK, n, WORLD))


def all_reduce_sum(values):
    """A tensor, added up over all processes."""
    return _all_reduce(values, dist.ReduceOp.SUM)


def all_reduce_max(values):
    """The largest values of a tensor over all processes, element by element."""
    return _all_reduce(values, dist.ReduceOp.MAX)


def _all_reduce(values, operation):
    if WORLD > 1:
        values = values.clone()
        dist.all_reduce(values, operation)
    return values


def barrier():
    """Wait until every process is here."""
    all_reduce_sum(torch.zeros(()))


def broadcast(make):
    """The result of `make()`, which only the first process calls. If it exits there, every process exits."""
    values = [None]
    if RANK == 0:
        try:
            values = [make()]
        except SystemExit as end:
            values = [end]
    if WORLD > 1:
        dist.broadcast_object_list(values)
    if isinstance(values[0], SystemExit):
        raise values[0]
    return values[0]

"""One process or many, as torchrun starts them. One alone is process 0 of 1, for which these functions do
nothing.
"""

import contextlib
import datetime
import os

import torch
from torch import distributed as dist

RANK, LOCAL_RANK, WORLD = (int(os.environ[name]) if dist.is_torchelastic_launched() else alone
                           for name, alone in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


@contextlib.contextmanager
def processes():
    """Join the other processes while it is entered."""
    if WORLD > 1:  # the others may wait long while one decodes the images
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                timeout=datetime.timedelta(days=1))
    yield
    if WORLD > 1:
        dist.destroy_process_group()


def share(n):
    """This process's part of a batch of n images, as a slice → the slice, how many images it counts for.

    Where none is left for it, it computes the first one and counts it for nothing, since every process has to
    take part in a step.
    """
    return (slice(RANK, None, WORLD) if RANK < n else slice(0, 1)), len(range(RANK, n, WORLD))


def total(values, op=dist.ReduceOp.SUM):
    """Sums (or what `op` says) over all processes of a tensor that each of them has."""
    if WORLD > 1:
        values = values.clone()
        dist.all_reduce(values, op)
    return values


def shared(make):
    """What `make()` gives in the first process, in all of them; where it ends that one, it ends all."""
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

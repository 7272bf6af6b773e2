"""How a step of training is executed: it may be compiled, shared by many processes, or recorded for a GPU.
What it computes is in train.py.
"""

import warnings

import torch
from torch.nn.parallel import DistributedDataParallel

import cli
from cli import warn
from distributed import WORLD, all_reduce_sum
from randomness import noise_shape


def prepare_network(model, data, args):
    """→ the model as it is called in training: compiled if that is asked for, and wrapped for many processes

    With a compiler or many processes, two steps are taken here, on zeros and without an update. They show
    whether a compiler works, and after them DDP has put its buckets into their final order, so that a resumed
    run adds up gradients in the same order.
    """
    cli.allow_tf32(True)  # as in training; otherwise everything would be compiled twice

    def try_out(network):
        n = len(range(0, min(args.batch_size, len(data.train)), WORLD))
        images = torch.zeros(n, *data.shape, dtype=torch.uint8, device=args.device)
        noise = None if args.loss_mode == "ae" else torch.zeros(noise_shape(n, args), device=args.device)
        for _ in range(2):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                rec, kl, _ = network(images, images.new_zeros(n, dtype=torch.long), noise)
            (rec + kl).backward()
            network.zero_grad()
        return network

    network = model
    if args.compile:
        torch.compiler.reset()  # of an earlier seed
        error = None
        try:  # with dynamic shapes, the code of a step would depend on the batches before it
            compiled = try_out(torch.compile(model, dynamic=False))
        except Exception as raised:  # a missing compiler may raise anything
            error = raised
        if all_reduce_sum(torch.tensor(float(error is not None))):  # all processes compile, or none
            warn(f"--compile: no compiler works here ({cli.one_line(error or 'in another process')}); the "
                 "run goes on without it")
        else:
            network = compiled
    if WORLD > 1:
        with warnings.catch_warnings():  # torch 2.13 renames broadcast_buffers; 2.11 knows only this name
            warnings.simplefilter("ignore", FutureWarning)
            network = try_out(DistributedDataParallel(network, broadcast_buffers=False,
                                                      gradient_as_bucket_view=True))
    return network


def record(function, args, size):
    """→ the function, recorded if this is the only process and on a GPU (see Recorded)"""
    if not cli.is_cuda(args.device) or WORLD > 1:
        return function
    torch.cuda.set_device(torch.device(args.device).index or 0)  # where streams are made
    return Recorded(function, size)


class Recorded:
    """A function that is called in each step, for a GPU: the fourth call is recorded as a CUDA graph, which
    later calls replay, with the same results to the last bit.

    A step has hundreds of small operations, and Python starts them more slowly than a GPU finishes them.
    Measured on an H200, milliseconds a step: 0.24 in place of 2.8 for the MLP at batch 128; 4.6 in place of
    45 for the residual network with a flow and Muon at batch 256.

    size: of a batch. Smaller batches are not replayed, nor are the first three, in which libraries and
    optimisers get their memory. What the function reads besides its arguments, such as weights, must stay
    where it is. It returns a list of tensors, which the next call overwrites. A recording keeps the memory of
    a whole step for itself.
    """

    def __init__(self, function, size):
        self.function, self.size, self.calls, self.recordable = function, size, 0, True
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def __call__(self, images, *others):
        given = [images, *others]
        if len(images) != self.size or not self.recordable:
            return self.function(*given)
        self.calls += 1
        if self.calls <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                results = self.function(*given)
            torch.cuda.current_stream().wait_stream(self.stream)
            return results
        if self.calls == 4:
            self.read = [value.clone() if isinstance(value, torch.Tensor) else value for value in given]
            stream = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self.results = self.function(*self.read)
            except RuntimeError as error:  # an operation such as .item(), which waits for the GPU
                torch.cuda.set_stream(stream)
                self.recordable = False
                warn("steps are slower than they could be, because they cannot be recorded: "
                     + cli.one_line(error.__context__ or error))
            if not self.recordable:
                return self.function(*given)
        for place, value in zip(self.read, given):
            if isinstance(value, torch.Tensor):
                place.copy_(value)
        self.graph.replay()
        return self.results

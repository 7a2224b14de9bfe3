"""Several processes under torchrun: data parallelism.

N processes hold the same weights, read B / N of the streams each, and average their gradients. A mean over T
B tokens is the mean of N means over T B / N, so a step is what it is for one process, but for rounding and
dropout masks. Process 0 alone prints and writes. One process meets none of this: the functions leave what
they are given as it is.
"""

import atexit
import contextlib
import os
import sys

import torch
import torch.distributed as dist

from harness.command_line import UserError


def join(device):
    """Meet the other processes of torchrun, if this one has any. Returns what `who` does."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        local = int(os.environ["LOCAL_RANK"])
        if device == "mps" or (device == "cuda" and local >= torch.cuda.device_count()):
            raise UserError(f"process {local + 1} of this machine finds no device of its own; "
                            "add --device cpu, or start fewer")
        if device == "cuda":
            torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        if rank:
            sys.stdout = open(os.devnull, "w")
    return who()


def who():
    """(Which process this is, how many there are), after `join`."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def first_process_first():
    """What is done within, process 0 does before the others do."""
    if dist.is_initialized() and dist.get_rank():
        dist.barrier()
    yield
    if dist.is_initialized() and not dist.get_rank():
        dist.barrier()


def own_streams(tensors, seed, generators):
    """Of tensors (L, B) this process's (L, B / processes); from now on its random numbers are its own."""
    rank, processes = who()
    batch_size = tensors[0].shape[1]
    if batch_size % processes:
        raise UserError(f"--batch-size {batch_size} cannot be divided evenly among {processes} processes")
    if rank:
        torch.manual_seed(seed + rank)
        for generator in generators:
            generator.manual_seed(seed + rank)
    return [t.chunk(processes, 1)[rank] for t in tensors]


def average_gradients(module):
    """From now on, backward leaves in each parameter's .grad the mean over the processes."""
    def average(parameter):
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    if dist.is_initialized():
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(average)


def mean(value):
    """The mean over the processes of a tensor; a number is the same in all of them."""
    if not dist.is_initialized() or not torch.is_tensor(value):
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def largest(*numbers):
    """Of each number, the largest that any process has."""
    if not dist.is_initialized():
        return numbers
    numbers = torch.tensor([float(n) for n in numbers])
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.int().tolist()


def gathered(value):
    """[value of process 0, of process 1, ...], with the tensors in their lists and tuples on the CPU."""
    values = [each(lambda t: t.detach().cpu(), value)]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, values[0])
    return values


def side_by_side(states):
    """Of the states of several processes, that of all streams; B is the last dimension but one."""
    first = states[0]
    if isinstance(first, (list, tuple)):
        return type(first)(map(side_by_side, zip(*states)))
    return torch.cat(states, -2) if torch.is_tensor(first) else first


def own_share(state, device):
    """Of a state of all streams, that of this process: the inverse of `side_by_side`."""
    rank, processes = who()
    return each(lambda t: t.chunk(processes, -2)[rank].clone().to(device), state)


def each(function, value):
    """`value` with function(tensor) for each tensor in its lists and tuples."""
    if isinstance(value, (list, tuple)):
        return type(value)(each(function, v) for v in value)
    return function(value) if torch.is_tensor(value) else value

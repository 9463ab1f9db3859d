"""What several processes need beyond DistributedDataParallel.

A place to run, sums over ranks, one batch norm for all, and a common end. Alone, a process is rank 0 of 1.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import warnings
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm  # SyncBatchNorm, too, is one

from .errors import InputError

# PyTorch 2.13 renames DistributedDataParallel's broadcast_buffers; 2.6 knows no other name.
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")


class Place(NamedTuple):
    """Where a process runs: its rank among `world` processes, and its device."""

    rank: int
    world: int
    device: torch.device


def start():
    """The Place of this process. Under torchrun joins the group: NCCL on GPUs, gloo on CPUs."""
    gpu = torch.cuda.is_available()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        count = torch.cuda.device_count()
        if device.index >= count:
            raise InputError(f"torchrun started {device.index + 1} or more processes here, but there are "
                             f"{count} GPUs; use --nproc_per_node={count}")
        torch.cuda.set_device(device)
    else:
        keep_memory()
    if "RANK" in os.environ:
        store = launch_store()
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # The store outlives restarts: processes would find the addresses of those that are gone.
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=world)
    return Place(rank, world, device)


def keep_memory():
    """Have the C library keep what this process frees, for its next step, which asks for the same again.

    glibc gives large blocks back to the system, and each of their pages costs a fault when it is asked for
    again: 10,000 a step of the demo (docs/performance.md). Other C libraries have no such setting and go on
    as they are. What the process needed at its peak stays with it until it ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)
    mallopt(M_MMAP_THRESHOLD, 32 * 2 ** 20)  # the largest that it takes


def stop():
    """Leave the group, if there is one, all processes together: one that leaves early may abort."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@cache
def launch_store():
    """The store that torchrun keeps through its restarts; None without torchrun."""
    return next(dist.rendezvous("env://"))[0] if "RANK" in os.environ else None


def remember(key, value):
    """Leave a text for the processes that torchrun starts in place of these; nothing without torchrun."""
    if launch_store() is not None:
        launch_store().set(f"sst {key}", value)


def recall(key):
    """The text that processes of this launch left, or None."""
    store = launch_store()
    return store.get(f"sst {key}").decode() if store is not None and store.check([f"sst {key}"]) else None


def all_reduce(tensor):
    """The sum of a tensor over all processes (itself where there is one)."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def barrier():
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def broadcast(value):
    """The first process's value, in all of them."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gather(values):
    """The lists of all processes as one, sorted: the same in all of them, and however many they are."""
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, values)
        values = [value for part in parts for value in part]
    return sorted(values)


def first():
    """Whether this is the first process: the one that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def print0(text, file=None):
    """Print in the first process, at once."""
    if first():
        print(text, file=file or sys.stdout, flush=True)


def peak_memory(device):
    """The most that this process has held so far, in GiB: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    import resource  # not on Windows
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def compiler_fault(device):
    """Why torch.compile does not work on this machine, in a few words, or None. CPUs need a C++ compiler."""
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # of many types, by what is missing
        return str(error).strip().splitlines()[0]


class Interruption:
    """Remembers a SIGTERM (preemption) or SIGINT (Ctrl-C), so that training can end between two steps.

    `signal` is its number, or 0. A second Ctrl-C ends the process at once.
    """

    signal = 0

    def __enter__(self):
        self.before = {n: signal.signal(n, self.remember) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def remember(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        # Loading processes ignore the SIGTERM that would end them. DataLoader takes their end for a failure.
        watch = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        signal.signal(signal.SIGCHLD, watch)


def ignore_signals(worker):
    """Set up a loading process: a signal to the whole group is for the training process, which needs it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class StepStatistics:
    """Running statistics that do not depend on the number of processes: batch norm's, and counts of
    associations.

    They must come out the same whether a step's K micro-batches ran one after another or on K ranks: each
    starts from the statistics before the step, and the step's are their mean.
    """

    def __init__(self, model):
        self.norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
        self.buffers = [b for m in self.norms for b in (m.running_mean, m.running_var)]
        self.buffers += [b for m in model.modules() if hasattr(m, "statistics") for b in m.statistics()]

    def begin(self):
        """Before a step."""
        if self.buffers:
            self.start, self.sum = flat(self.buffers), 0
            self.seen = int(self.norms[0].num_batches_tracked) if self.norms else 0

    def collect(self):
        """After a micro-batch."""
        if self.buffers:
            self.sum = self.sum + flat(self.buffers)
            self.write(self.start, self.seen)

    def finish(self, K):
        """After a step of K micro-batches in all."""
        if self.buffers:
            self.write(all_reduce(self.sum) / K, self.seen + K)

    def undo(self):
        """Forget a step."""
        if self.buffers:
            self.write(self.start, self.seen)

    def write(self, values, seen):
        for buffer, part in zip(self.buffers, values.split([b.numel() for b in self.buffers])):
            buffer.copy_(part.view_as(buffer))
        for norm in self.norms:
            norm.num_batches_tracked.fill_(seen)


def flat(buffers):
    return torch.cat([b.reshape(-1) for b in buffers])

"""Several processes that train one model: as torchrun starts them, over gloo on the CPU and NCCL on CUDA.

Not in the reference: it is one process.

Every process does the same steps on rows of its own of each batch, and evaluates the same batches; what decides where
it goes on is either equal in all of them or agreed upon (`agree`). Sums are sums, not means: a loss is divided by the
number of targets in the whole batch before its gradient is taken. What travels is tensors; what else
torch.distributed.checkpoint sends from one process to another is its own.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qtx_ref.spec import read_processes

BEAT_SECONDS = 5.0  # between two signs of life
LOST_SECONDS = 30.0  # without one, a process counts as lost
END_SECONDS = 20.0  # that a process may take to end after another was lost


def processes() -> tuple[int, int]:
    """This process's number, from 0, and how many train one model."""
    return read_processes()


@contextmanager
def join(device: torch.device) -> Iterator[None]:
    """The processes that torchrun started find each other and, at the end, wait for each other; one alone does neither.

    Raises ConnectionError where another one is lost.
    """
    rank, count = processes()
    if count == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    with turn_losses(rank, count):
        with end_at_once():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        pulse = Pulse(rank, count)
        try:
            yield
            pulse.stop()
            gc.collect()  # models of the processes' group, whose threads must not outlive it
            dist.barrier()
        finally:
            pulse.stop()
            if sys.exc_info()[0] is None:
                dist.destroy_process_group()
            else:  # which could wait for the one that is lost
                end_later()


@contextmanager
def end_at_once() -> Iterator[None]:
    """SIGINT and SIGTERM end the process: Python's handlers would wait until the others have come."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def turn_losses(rank: int, count: int) -> Iterator[None]:
    """Turns what gloo, NCCL and the store say of a connection that is gone into one line, a ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Gloo"))):
            raise
        raise ConnectionError(say_lost(rank, count)) from None


def say_lost(rank: int, count: int) -> str:
    """What a process says that goes because another is gone."""
    return f"process {rank} of {count} lost another one and stops; start all of them again with --resume"


def end_later() -> None:
    """Ends the process if it has not ended by itself in a while: NCCL may wait for what will not come."""
    timer = threading.Timer(END_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()


class Pulse:
    """A sign of life to the other processes every few seconds, and an ear for theirs: where one falls silent, because
    its machine is gone or it hangs, this process says so in a line and ends, whatever it waits for."""

    def __init__(
        self, rank: int, count: int, beat: float = BEAT_SECONDS, lost: float = LOST_SECONDS, end: Callable | None = None
    ) -> None:
        """end: called with the line, if it must come to that; None: the process ends."""
        self.rank, self.count, self.beat, self.lost = rank, count, beat, lost
        self.end = end or self.leave
        self.stopped = threading.Event()
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = dist.TCPStore(host, port, is_master=False)
        self.store.set(self.key(rank), "0")
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def key(self, rank: int) -> str:
        return f"qtx.pulse.{rank}"

    def run(self) -> None:
        """Beats and listens until it is stopped."""
        keys = [self.key(other) for other in range(self.count)]
        beats = 0
        heard = [b""] * self.count
        since = [time.monotonic()] * self.count
        while not self.stopped.wait(self.beat):
            beats += 1
            try:
                self.store.set(self.key(self.rank), str(beats))
                fresh = self.store.multi_get(keys)
            except RuntimeError:  # the store has gone, with the process that kept it
                fresh = heard
            now = time.monotonic()
            since = [now if new != old else then for new, old, then in zip(fresh, heard, since, strict=True)]
            heard = fresh
            if now - min(since) > self.lost and not self.stopped.is_set():
                self.end(say_lost(self.rank, self.count))
                return

    def leave(self, line: str) -> None:
        """Ends the process, wherever it is."""
        os.write(2, f"\nError: {line}\n".encode())
        os._exit(1)

    def stop(self) -> None:
        """No more beats are sent or missed."""
        self.stopped.set()


# --- numbers ----------------------------------------------------------------------------------------------------------


def agree(values: Sequence[float]) -> list[float]:
    """The largest of all processes' values, place by place."""
    return _reduce(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.MAX).tolist()


def add(value: Tensor) -> Tensor:
    """The sum over processes, in place."""
    return _reduce(value, dist.ReduceOp.SUM)


def share_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The least of all processes' low, and the largest of their high."""
    if not dist.is_initialized():
        return low, high
    ends = _reduce(torch.stack([-low, high]), dist.ReduceOp.MAX)
    return -ends[0], ends[1]


def _reduce(value: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(value, how)
    return value


# --- a model on several processes -------------------------------------------------------------------------------------


class Loss(nn.Module):
    """A model's loss as a module, which is what DDP takes: its logits do not leave it."""

    def __init__(self, net: nn.Module, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.net = net
        self.compute = compute

    def forward(self, *inputs: Any) -> Tensor:
        return self.compute(*inputs)


def copy_whole(net: nn.Module, compute: Callable[..., Tensor]) -> nn.parallel.DistributedDataParallel:
    """`compute`, a loss of the model, whose gradients are summed over processes, each of which has the whole model (Li
    et al. 2020). Parameters that need no gradient by now get none."""
    # Looking for unused parameters (a learned zero point) also keeps DDP from grouping gradients anew after the first
    # step: in a resumed run, whose first step is another, they would be summed in another order.
    spread = nn.parallel.DistributedDataParallel(
        Loss(net, compute), find_unused_parameters=True, gradient_as_bucket_view=True
    )
    spread.register_comm_hook(None, sum_bucket)
    return spread


def sum_bucket(state, bucket):  # DDP refuses annotations that are strings
    """DDP's own way without its division by the number of processes: a future of the summed bucket."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


def hold_back(loss: Callable[..., Tensor], last: bool) -> AbstractContextManager:
    """Where a part of a batch is not the `last`, its gradients wait to be summed with the last one's."""
    return loss.no_sync() if isinstance(loss, nn.parallel.DistributedDataParallel) and not last else nullcontext()


def shard(net: nn.Module, device: torch.device, whole: set[nn.Parameter], *, bfloat16: bool) -> None:
    """Each process keeps its share of every block's parameters and gathers the rest while it computes the block (FSDP2;
    Zhao et al. 2023); gradients are summed, each into its share, those of all parts of a batch as they come.

    whole: small parameters that every process keeps. bfloat16: parameters of blocks travel so, as autocast
    would round those of matmuls anyway.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    # Nothing is computed in place on what a block returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    kind = torch.bfloat16 if bfloat16 else None
    policy = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(device.type, (processes()[1],))
    for block in net.layer:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=whole)
    fully_shard(net, mesh=mesh, ignored_params=whole)  # embeddings begin the residual stream, which is float32
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other


def own(value: Tensor) -> Tensor:
    """This process's share of a tensor, in the same memory; all of it where it is not shared out."""
    return value.detach()._local_tensor if is_shared(value) else value


def is_shared(value: Tensor) -> bool:
    """Whether each process holds a share of it."""
    return hasattr(value, "_local_tensor")


def take(whole: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor the share that this process has of `like`."""
    if not is_shared(like):
        return whole
    rank, count = processes()
    parts = whole.chunk(count)  # as FSDP2 divides the first axis
    return parts[rank] if rank < len(parts) else whole[:0]


def place(share: Tensor, like: Tensor) -> Tensor:
    """A share as the DTensor that `like` is; the tensor itself where that is none."""
    if not is_shared(like):
        return share
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        share, like.device_mesh, like.placements, run_check=False, shape=like.size(), stride=like.stride()
    )


def gather(value: Tensor) -> Tensor:
    """The whole tensor, in every process."""
    return value.detach().full_tensor() if is_shared(value) else value


def sum_squares(squares: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Tensor:
    """The sum of all numbers; of those that each process has of its own share of a tensor, over all processes."""
    rows = torch.stack(list(squares.values()))
    shared = torch.tensor([is_shared(like[name]) for name in squares], device=rows.device)
    return add((rows * shared).sum()) + (rows * ~shared).sum() if shared.any() else rows.sum()


# --- shares on the disk -----------------------------------------------------------------------------------------------


def save_shares(folder: str, tensors: dict[str, Tensor]) -> None:
    """Writes each process's shares into a safetensors file of the folder. Raises OSError where one cannot."""
    import torch.distributed.checkpoint as checkpoint

    with turn_failures():
        checkpoint.save(tensors, storage_writer=checkpoint.HuggingFaceStorageWriter(folder, save_distributed=True))


def load_shares(folder: str, tensors: dict[str, Tensor]) -> None:
    """Reads this process's shares, however many processes wrote the folder, into `tensors`. Raises OSError where it
    cannot."""
    import torch.distributed.checkpoint as checkpoint

    with turn_failures():
        checkpoint.load(tensors, storage_reader=checkpoint.HuggingFaceStorageReader(folder))


@contextmanager
def turn_failures() -> Iterator[None]:
    """Turns what a process failed of, which torch tells all of them, into an OSError."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        if isinstance(reason, OSError):
            raise reason from None
        raise OSError(f"process {rank}: {' '.join(str(reason).split())}") from None


__all__ = [
    "add",
    "agree",
    "copy_whole",
    "gather",
    "hold_back",
    "join",
    "load_shares",
    "own",
    "place",
    "processes",
    "save_shares",
    "shard",
    "share_range",
    "sum_squares",
    "take",
]

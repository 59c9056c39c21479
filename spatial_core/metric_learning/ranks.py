"""The processes of one training run: one by itself, or several that `torchrun` started, called ranks.

Every rank holds the training data and draws the same batches from the same seeded generator, so sampler and bandit are
replicated rather than communicated. Of each batch a rank takes its contiguous share through the head; gradients are
added up over all ranks, and so is the vector of losses, in which each rank fills its own share. From there on all of
them compute the same update and the same rewards. The sum of the ranks' gradients is the gradient of the mean over the
whole batch however uneven the shares are.

Rank 0 alone validates, decides, writes and reports. It tells the others when to train an epoch, with the state to do it
from, and when the run ends and how. Several ranks give, up to rounding, the weights that one process gives, except that
each rank draws its own dropout masks; two runs with equally many ranks are equal to the bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from spatial_core.errors import ConfigError, RankLost, SpatialError

_Result = TypeVar("_Result")
# Ranks wait for the first one while it validates. One that dies closes its connections, which ends the wait at once.
_PATIENCE = timedelta(hours=12)


class Ranks:
    """One process by itself: everything is its own share, and there is nobody to talk to."""

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1

    @property
    def is_first(self) -> bool:
        """Whether this process validates, writes and reports."""
        return self.rank == 0

    def use(self, device: torch.device) -> None:
        """Say which device this rank trains on, before `combine`."""

    def first(self, work: Callable[[], _Result]) -> _Result:
        """Let the first rank do something; its result, or its failure, is everyone's."""
        return work()

    def all(self, work: Callable[[], _Result]) -> _Result:
        """Let every rank do something; each gets its own result, but a failure of one is everyone's."""
        return work()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag

    def tell(self, message: Callable[[], Any]) -> None:
        """First rank: send the others what they are waiting for in `hear`; it is only made when there are others."""

    def lead(self, work: Callable[[], _Result]) -> _Result:
        """First rank: do the run; its result, or its failure, is the last thing the others `hear`."""
        return work()

    def hear(self) -> Any:
        """Other ranks: wait for what the first one tells.

        Raises:
            SpatialError: the failure that ended the run on the first rank.
            RankLost: if the first rank is gone.
        """
        raise RuntimeError("one process by itself hears nothing")

    def combine(self, parameters: Sequence[Parameter], losses: Tensor, total: int) -> Tensor:
        """Add up the gradients over all ranks, in place, and put the losses together.

        Args:
            parameters: of the head, each with the gradient of this rank's share of the batch's mean loss.
            losses: (S,) of the share.
            total: B, triplets in the batch.

        Returns:
            (B,) losses of the whole batch.
        """
        return losses

    def share(self, total: int) -> slice:
        """This rank's part of a batch of `total`."""
        return slice(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def seed_dropout(self, seed: int, epoch: int) -> None:
        """Give a rank that is not the first its own dropout masks, the same in every run.

        The first keeps its stream of random numbers, whose state is saved with the run.
        """
        if not self.is_first:
            text = f"dropout/{seed}/{epoch}/{self.rank}/{self.size}"
            torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))


@dataclass(frozen=True)
class _Outcome:
    """What `first`, `all` and `lead` send: a value, or the failure instead of it."""

    value: Any = None
    failure: SpatialError | None = None

    def unwrap(self) -> Any:
        if self.failure is not None:
            raise self.failure
        return self.value


class _Together(Ranks):
    """Several processes, connected through gloo; gradients on CUDA devices go through NCCL."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.local_size = int(os.environ["LOCAL_WORLD_SIZE"])
        self._gradients: dist.ProcessGroup | None = None

    def use(self, device: torch.device) -> None:
        kinds: list[Any] = [None] * self.size
        with self._connected():
            dist.all_gather_object(kinds, device.type)
        if len(set(kinds)) > 1:
            raise ConfigError(
                f"infrastructure.device: the processes of this run train on {', '.join(map(str, kinds))}; "
                "they must all have a CUDA device, or infrastructure.device must be cpu"
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
            with self._connected():
                self._gradients = dist.new_group(backend="nccl")

    def first(self, work: Callable[[], _Result]) -> _Result:
        outcome = self._attempt(work) if self.is_first else None
        result: _Result = self._broadcast(outcome).unwrap()
        return result

    def all(self, work: Callable[[], _Result]) -> _Result:
        own = self._attempt(work)
        failures: list[Any] = [None] * self.size
        with self._connected():
            dist.all_gather_object(failures, own.failure)
        result: _Result = own.unwrap()
        for failure in failures:
            if failure is not None:
                raise failure
        return result

    def any(self, flag: bool) -> bool:
        flags = torch.tensor([int(flag)])
        with self._connected():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def tell(self, message: Callable[[], Any]) -> None:
        self._broadcast(_Outcome(message()))

    def lead(self, work: Callable[[], _Result]) -> _Result:
        outcome = self._attempt(work)
        self._broadcast(outcome)
        result: _Result = outcome.unwrap()
        return result

    def hear(self) -> Any:
        return self._broadcast(None).unwrap()

    def combine(self, parameters: Sequence[Parameter], losses: Tensor, total: int) -> Tensor:
        # A share may be empty; then nothing went through the head.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        everywhere = losses.new_zeros(total)
        everywhere[self.share(total)] = losses
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), everywhere])
        with self._connected():
            dist.all_reduce(flat, group=self._gradients)
        *sums, everywhere = torch.split(flat, [*(gradient.numel() for gradient in gradients), total])
        for parameter, added in zip(parameters, sums, strict=True):
            parameter.grad = added.view_as(parameter)
        return everywhere

    def _attempt(self, work: Callable[[], Any]) -> _Outcome:
        try:
            return _Outcome(work())
        except RankLost:
            raise  # there may be nobody left to tell
        except SpatialError as error:
            return _Outcome(failure=error)

    def _broadcast(self, outcome: _Outcome | None) -> _Outcome:
        box: list[Any] = [outcome]
        with self._connected():
            dist.broadcast_object_list(box, src=0)
        sent: _Outcome = box[0]
        return sent

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what torch raises for a broken connection and for a wait without end
            cause = " ".join(str(error).split())[:200]
            raise RankLost(
                f"process {self.rank} of {self.size}: lost another process of the run, whose log says why ({cause}); "
                "run again to go on from the last finished epoch"
            ) from error


@contextlib.contextmanager
def gathered() -> Iterator[Ranks]:
    """The ranks of this run: the processes that `torchrun` started, as its environment variables say, or just this one.

    Raises:
        RankLost: if the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "LOCAL_RANK" not in os.environ:
        yield Ranks()
        return
    try:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    except RuntimeError as error:
        cause = " ".join(str(error).split())[:200]
        raise RankLost(f"the processes of this run do not find each other ({cause})") from error
    yield _Together()
    # Only after success: with a rank gone, taking leave of the others could wait for it.
    dist.destroy_process_group()

"""How blocks of work on a CPU are spread over cores, and the arithmetic they may rely on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Block = TypeVar("Block")


def in_threads(work: Callable[[Block], None], blocks: Sequence[Block], threads: int, *, alone: bool = False) -> None:
    """Blocks side by side, each on one thread of torch and OpenMP.

    Torch's own threads would meet after every operation on a tile: where other work holds a core, one always waits
    for another, and two threads were slower than one. Blocks never wait for each other.
    """
    import torch

    if alone or threads == 1 or len(blocks) == 1:
        with _torch_threads(threads):
            for block in blocks:
                work(block)
        return
    with (
        _torch_threads(torch.get_num_threads()),
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        list(pool.map(work, blocks))


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """So many threads inside the block, and as many as before after it, for other threads of Python too."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 or bfloat16 products inside the block, whatever the process has switched on for training."""
    import torch

    mode = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(mode)

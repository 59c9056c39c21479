"""Streams images through a model: decoding, resizing and forward passes overlap, order is kept, memory is bounded.

Generic on purpose: `forward` may be a bare backbone or a published model with its projector. A feeder thread reads the
images and hands them to decoding threads; the calling thread only runs the model. Batches are cut by position in the
input, so vectors do not depend on the number of threads or on timing: batch k always holds the same images.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from spatial_core.backbones.preprocessing import Preprocessing
from spatial_core.errors import ModelError
from spatial_core.images.decode import ImageError, decode_jpeg

# Batches decoded ahead of the model: one being filled while one waits.
_AHEAD = 2

Forward = Callable[[torch.Tensor], torch.Tensor]
ImageBytes = bytes | memoryview
Source = ImageBytes | Callable[[], ImageBytes]


@dataclass(frozen=True)
class Reject:
    """An image that has no vector: its row, a short code for counting, and what was found."""

    row: int
    reason: str
    detail: str


@dataclass(frozen=True)
class FeatureBatch:
    """Features of consecutive input images.

    Args:
        rows: (n,) int64, the callers' row numbers in input order.
        vectors: (n, D) float32; (0, 0) while no image has had a vector.
        rejects: images of the same stretch of input without a vector; n + len(rejects) images were read.
        forward_size: images the last forward pass was allowed to hold; below the batch size once memory ran out.
    """

    rows: npt.NDArray[np.int64]
    vectors: npt.NDArray[np.float32]
    rejects: list[Reject] = field(default_factory=list)
    forward_size: int = 0


@dataclass
class _Pending:
    """A batch being decoded, one slot an image, into (B, 3, H, W): normalised float32, or uint8 for a GPU."""

    rows: list[int]
    pixels: torch.Tensor
    slots: list[Future[Reject | None]]


def stream_features(
    forward: Forward,
    preprocessing: Preprocessing,
    images: Iterable[tuple[int, Source]],
    *,
    batch_size: int,
    threads: int,
    device: torch.device | str = "cpu",
) -> Generator[FeatureBatch, None, None]:
    """Yield the features of `images` in order.

    Args:
        forward: (B, 3, H, W) float32 on `device` -> (B, D) of any float type; called in the consuming thread only,
            under `torch.inference_mode`.
        preprocessing: how pixels are prepared.
        images: (row, bytes of a JPEG), or (row, function returning them), which then runs in a decoding thread. Read
            from another thread; an `ImageError` of such a function rejects the image, any other error ends the stream.
        batch_size: images a forward pass; when the device runs out of memory it is halved and stays so.
        threads: decoding threads.
        device: where `forward` computes.

    Raises:
        ModelError: if not even one image fits in memory, or `forward` returns something other than (B, D).
        Exception: whatever `images` or a function in it raises.

    Closing the generator stops its threads.
    """
    device = torch.device(device)
    runner = _Runner(forward, preprocessing, device, batch_size)
    feeder = _Feeder(preprocessing, images, batch_size, threads, for_gpu=device.type == "cuda")
    waiting: deque[_Running] = deque()
    # On a GPU the next pass is launched before the last one's vectors are fetched.
    in_flight = 1 if device.type == "cuda" else 0
    try:
        for pending in feeder:
            outcomes = [slot.result() for slot in pending.slots]
            waiting.append(runner.launch(pending, outcomes))
            feeder.release()
            while len(waiting) > in_flight:
                yield waiting.popleft().fetch()
        while waiting:
            yield waiting.popleft().fetch()
    finally:
        feeder.close()


class _Feeder:
    """Reads images in a thread of its own and keeps at most `_AHEAD` batches in the making."""

    def __init__(
        self,
        preprocessing: Preprocessing,
        images: Iterable[tuple[int, Source]],
        batch_size: int,
        threads: int,
        for_gpu: bool,
    ) -> None:
        self._preprocessing = preprocessing
        self._images = images
        self._batch_size = batch_size
        self._for_gpu = for_gpu
        self._room = threading.Semaphore(_AHEAD)
        self._stopping = threading.Event()
        self._ready: queue.SimpleQueue[_Pending | BaseException | None] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._thread = threading.Thread(target=self._feed, name="feed", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[_Pending]:
        while (item := self._ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def release(self) -> None:
        """Allow one more batch."""
        self._room.release()

    def close(self) -> None:
        """Stop reading, drop what is not decoded yet, and wait for the threads."""
        self._stopping.set()
        self._room.release()
        self._thread.join()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _feed(self) -> None:
        try:
            batch: list[tuple[int, Source]] = []
            for item in self._images:
                if self._stopping.is_set():
                    return
                batch.append(item)
                if len(batch) == self._batch_size:
                    self._submit(batch)
                    batch = []
            if batch:
                self._submit(batch)
            self._ready.put(None)
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            self._ready.put(error)
        finally:
            # A generator that reads a file is closed here, in the thread that ran it.
            close = getattr(self._images, "close", None)
            if close is not None:
                close()

    def _submit(self, batch: list[tuple[int, Source]]) -> None:
        self._room.acquire()
        if self._stopping.is_set():
            return
        shape = (len(batch), 3, *self._preprocessing.output_size)
        # Pinned memory comes from torch's caching allocator, so a buffer per batch costs no system call.
        if self._for_gpu:
            pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        else:
            pixels = torch.empty(shape, dtype=torch.float32)
        view = pixels.numpy()
        slots = [self._pool.submit(self._decode, row, source, view[place]) for place, (row, source) in enumerate(batch)]
        self._ready.put(_Pending([row for row, _ in batch], pixels, slots))

    def _decode(self, row: int, source: Source, slot: npt.NDArray[Any]) -> Reject | None:
        try:
            data = source() if callable(source) else source
            pixels = self._preprocessing.pixels(decode_jpeg(data))
        except ImageError as error:
            return Reject(row, error.reason, str(error))
        if self._for_gpu:
            slot[...] = pixels.transpose(2, 0, 1)
        else:
            self._preprocessing.normalise_into(pixels, slot)
        return None


@dataclass
class _Running:
    """A launched batch: its vectors may still be on their way from the device."""

    rows: npt.NDArray[np.int64]
    vectors: torch.Tensor
    rejects: list[Reject]
    forward_size: int
    done: torch.cuda.Event | None
    # The copy to the device reads this buffer until `done`.
    source: torch.Tensor

    def fetch(self) -> FeatureBatch:
        if self.done is not None:
            self.done.synchronize()
        return FeatureBatch(self.rows, self.vectors.numpy(), self.rejects, self.forward_size)


class _Runner:
    """Runs forward passes, in smaller ones once memory ran out."""

    def __init__(self, forward: Forward, preprocessing: Preprocessing, device: torch.device, batch_size: int) -> None:
        self._forward = forward
        self._preprocessing = preprocessing
        self._device = device
        self._size = batch_size
        self._dim = 0
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def launch(self, pending: _Pending, outcomes: list[Reject | None]) -> _Running:
        good = [place for place, reject in enumerate(outcomes) if reject is None]
        rejects = [reject for reject in outcomes if reject is not None]
        pixels = pending.pixels[good] if rejects else pending.pixels
        rows = np.asarray([pending.rows[place] for place in good], dtype=np.int64)
        done = None
        with torch.inference_mode():
            vectors = self._vectors(pixels) if good else torch.empty((0, self._dim))
            if self._device.type == "cuda":
                host = torch.empty(vectors.shape, dtype=torch.float32, pin_memory=True)
                vectors = host.copy_(vectors, non_blocking=True)
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record(torch.cuda.current_stream(self._device))
        return _Running(rows, vectors, rejects, self._size, done, pixels)

    def _vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) on the host -> (n, D) float32 on the device."""
        parts: list[torch.Tensor] = []
        start = 0
        while start < len(pixels):
            part = self._try(pixels[start : start + self._size])
            if part is None:
                self._shrink(min(self._size, len(pixels) - start))
                continue
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _try(self, pixels: torch.Tensor) -> torch.Tensor | None:
        """One forward pass, or None when memory ran out; the failed pass's tensors are freed on return."""
        try:
            if self._copies is not None:
                pixels = self._preprocessing.normalise(self._upload(pixels, self._copies).permute(0, 2, 3, 1))
            vectors = self._forward(pixels.to(self._device))
        except torch.OutOfMemoryError:
            return None
        except RuntimeError as error:
            # The CPU allocator has no exception type of its own.
            if "can't allocate memory" in str(error):
                return None
            raise
        if vectors.ndim != 2 or len(vectors) != len(pixels) or not vectors.is_floating_point():
            raise ModelError(f"the model returned {tuple(vectors.shape)} {vectors.dtype} for {len(pixels)} images")
        self._dim = vectors.shape[1]
        return vectors.float()

    def _upload(self, pixels: torch.Tensor, copies: torch.cuda.Stream) -> torch.Tensor:
        """Copy on a stream of its own, so that the pass before is not waited for."""
        compute = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(copies):
            uploaded = pixels.to(self._device, non_blocking=True)
        compute.wait_stream(copies)
        uploaded.record_stream(compute)
        return uploaded

    def _shrink(self, tried: int) -> None:
        if tried == 1:
            raise ModelError(
                f"{self._device}: out of memory with a single image; use a smaller model or precision bf16"
            )
        self._size = tried // 2
        if self._device.type == "cuda":
            with contextlib.suppress(torch.OutOfMemoryError):
                torch.cuda.empty_cache()

"""Forward passes that shrink when memory runs out, and stay shrunk."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import torch

from spatial_core.errors import ModelError

Forward = Callable[[torch.Tensor], torch.Tensor]


class ForwardPasses:
    """Runs `forward` on batches; safe to call from several threads.

    Args:
        forward: (B, 3, H, W) -> (B, D) of any float type.
        prepare: what turns a slice of a batch into the input of `forward`; memory may run out in it, too.
        device: where it computes.
        size: images a pass.
    """

    def __init__(self, forward: Forward, prepare: Forward, device: torch.device, size: int) -> None:
        self._forward = forward
        self._prepare = prepare
        self._device = device
        self._lock = threading.Lock()
        self.size = size
        self.dim = 0

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """(n, ...) -> (n, D) float32 on the device, in passes of at most `size` images.

        Raises:
            ModelError: if not even one image fits in memory, or `forward` returns anything but (n, D) floats.
        """
        if not len(batch):
            return torch.empty((0, self.dim))
        parts: list[torch.Tensor] = []
        start = 0
        with torch.inference_mode():
            while start < len(batch):
                images = batch[start : start + self.size]
                part = self._try(images)
                if part is None:
                    self._shrink(len(images))
                    continue
                parts.append(part)
                start += len(part)
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _try(self, images: torch.Tensor) -> torch.Tensor | None:
        """One pass, or None when memory ran out; the failed pass's tensors are freed on return."""
        try:
            vectors = self._forward(self._prepare(images))
        except torch.OutOfMemoryError:
            return None
        except RuntimeError as error:
            # The CPU allocator has no exception type of its own.
            if "can't allocate memory" in str(error):
                return None
            raise
        if vectors.ndim != 2 or len(vectors) != len(images) or not vectors.is_floating_point():
            raise ModelError(f"the model returned {tuple(vectors.shape)} {vectors.dtype} for {len(images)} images")
        self.dim = vectors.shape[1]
        return vectors.float()

    def _shrink(self, tried: int) -> None:
        if tried == 1:
            raise ModelError(
                f"{self._device}: out of memory with a single image; use a smaller model or precision bf16"
            )
        with self._lock:
            self.size = min(self.size, tried // 2)
        if self._device.type == "cuda":
            with contextlib.suppress(torch.OutOfMemoryError):
                torch.cuda.empty_cache()

"""Order, determinism, rejects, memory and threads of the feature stream."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import simplejpeg
import torch

from spatial_core.backbones.engine import FeatureBatch, Source, stream_features
from spatial_core.backbones.preprocessing import Preprocessing, parse_preprocessing
from spatial_core.errors import DigestMismatch, ModelError
from spatial_core.images.decode import ImageError, decode_jpeg

BATCH = 4
# The GPU has a path of its own; it is tested where there is one.
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(scope="module")
def preprocessing() -> Preprocessing:
    record = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 28, "width": 28},
    }
    return parse_preprocessing(record, "test")


@pytest.fixture(scope="module")
def jpegs() -> list[bytes]:
    random = np.random.default_rng(0)
    sizes = random.integers(30, 120, (30, 2))
    # One flat colour each, under noise, so that a vector tells which image it came from.
    pictures = [
        np.clip(random.integers(0, 255, 3) + random.integers(-20, 20, (height, width, 3)), 0, 255).astype(np.uint8)
        for height, width in sizes
    ]
    return [simplejpeg.encode_jpeg(picture, quality=95) for picture in pictures]


def mean_colour(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.mean((2, 3))


def gather(batches: Iterator[FeatureBatch]) -> tuple[list[int], np.ndarray, list[tuple[int, str]]]:
    read = list(batches)
    rows = [int(row) for batch in read for row in batch.rows]
    rejects = [(reject.row, reject.reason) for batch in read for reject in batch.rejects]
    return rows, np.concatenate([batch.vectors for batch in read]), rejects


def one_by_one(preprocessing: Preprocessing, jpegs: list[bytes]) -> np.ndarray:
    vectors = []
    for jpeg in jpegs:
        pixels = torch.from_numpy(preprocessing.pixels(decode_jpeg(jpeg)).copy())[None]
        vectors.append(mean_colour(preprocessing.normalise(pixels))[0].numpy())
    return np.stack(vectors)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_order_and_bits_do_not_depend_on_threads(
    preprocessing: Preprocessing, jpegs: list[bytes], threads: int
) -> None:
    images = [(7 * row, jpeg) for row, jpeg in enumerate(jpegs)]
    alone = gather(stream_features(mean_colour, preprocessing, images, batch_size=BATCH, threads=1))
    rows, vectors, rejects = gather(
        stream_features(mean_colour, preprocessing, images, batch_size=BATCH, threads=threads)
    )
    assert rows == [row for row, _ in images]
    assert rejects == []
    np.testing.assert_array_equal(vectors, alone[1])
    np.testing.assert_allclose(vectors, one_by_one(preprocessing, jpegs), atol=1e-6)


def test_a_slow_batch_is_not_overtaken(preprocessing: Preprocessing, jpegs: list[bytes]) -> None:
    next_batch_read = threading.Event()

    def first() -> bytes:
        assert next_batch_read.wait(10), "the second batch was not begun while the first was on its way"
        return jpegs[0]

    def fifth() -> bytes:
        next_batch_read.set()
        return jpegs[BATCH]

    images: list[tuple[int, Source]] = list(enumerate(jpegs[:10]))
    images[0], images[BATCH] = (0, first), (BATCH, fifth)
    rows, vectors, _ = gather(stream_features(mean_colour, preprocessing, images, batch_size=BATCH, threads=2))
    assert rows == list(range(10))
    np.testing.assert_allclose(vectors, one_by_one(preprocessing, jpegs[:10]), atol=1e-6)


def test_decoding_goes_on_during_a_forward_pass(preprocessing: Preprocessing, jpegs: list[bytes]) -> None:
    """Each pass waits until an image of the second batch has been read, which needs overlap."""
    next_batch_read = threading.Event()

    def source(row: int) -> Source:
        def read() -> bytes:
            if row >= BATCH:
                next_batch_read.set()
            return jpegs[row]

        return read

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        assert next_batch_read.wait(10)
        return mean_colour(pixels)

    images = [(row, source(row)) for row in range(2 * BATCH)]
    rows, _, _ = gather(stream_features(forward, preprocessing, images, batch_size=BATCH, threads=2))
    assert rows == list(range(2 * BATCH))


def test_bad_images_are_rejected_with_their_reason(preprocessing: Preprocessing, jpegs: list[bytes]) -> None:
    def refused() -> bytes:
        raise ImageError("image_null", "no bytes in this row")

    images: list[tuple[int, Source]] = list(enumerate(jpegs[:12]))
    images[0] = (0, b"")
    images[5] = (5, jpegs[5][: len(jpegs[5]) // 2])
    images[6] = (6, b"\x89PNG\r\n\x1a\n")
    images[11] = (11, refused)
    rows, vectors, rejects = gather(stream_features(mean_colour, preprocessing, images, batch_size=BATCH, threads=3))
    assert rejects == [(0, "image_empty"), (5, "image_corrupt"), (6, "image_not_jpeg"), (11, "image_null")]
    kept = [row for row in range(12) if row not in {0, 5, 6, 11}]
    assert rows == kept
    np.testing.assert_allclose(vectors, one_by_one(preprocessing, [jpegs[row] for row in kept]), atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_each_device_gives_the_same_vectors_whatever_goes_wrong(
    preprocessing: Preprocessing, jpegs: list[bytes], device: str
) -> None:
    def forward(pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.device.type == device
        assert pixels.dtype == torch.float32
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return mean_colour(pixels)

    images: list[tuple[int, Source]] = list(enumerate(jpegs))
    images[9] = (9, jpegs[9][:100])
    stream = stream_features(forward, preprocessing, images, batch_size=8, threads=3, device=device)
    rows, vectors, rejects = gather(stream)
    kept = [row for row in range(len(jpegs)) if row != 9]
    assert rows == kept
    assert [row for row, _ in rejects] == [9]
    np.testing.assert_allclose(vectors, one_by_one(preprocessing, [jpegs[row] for row in kept]), atol=1e-5)


def test_a_stream_of_bad_images_only(preprocessing: Preprocessing) -> None:
    batches = list(
        stream_features(mean_colour, preprocessing, [(row, b"x") for row in range(5)], batch_size=2, threads=1)
    )
    assert [len(batch.rows) for batch in batches] == [0, 0, 0]
    assert sum(len(batch.rejects) for batch in batches) == 5


def test_no_images(preprocessing: Preprocessing) -> None:
    assert list(stream_features(mean_colour, preprocessing, [], batch_size=2, threads=1)) == []


@pytest.mark.parametrize(
    "shortage",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_halves_the_batch_for_good(
    preprocessing: Preprocessing, jpegs: list[bytes], shortage: Exception
) -> None:
    sizes: list[int] = []

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pixels))
        if len(pixels) > 3:
            raise shortage
        return mean_colour(pixels)

    batches = list(stream_features(forward, preprocessing, enumerate(jpegs[:20]), batch_size=8, threads=1))
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    assert batches[-1].forward_size == 2
    vectors = np.concatenate([batch.vectors for batch in batches])
    np.testing.assert_allclose(vectors, one_by_one(preprocessing, jpegs[:20]), atol=1e-6)


def test_memory_running_out_in_several_threads(preprocessing: Preprocessing, jpegs: list[bytes]) -> None:
    def forward(pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return mean_colour(pixels)

    batches = list(stream_features(forward, preprocessing, enumerate(jpegs), batch_size=8, threads=3))
    assert batches[-1].forward_size == 2
    vectors = np.concatenate([batch.vectors for batch in batches])
    np.testing.assert_allclose(vectors, one_by_one(preprocessing, jpegs), atol=1e-6)


def test_torch_computes_with_as_many_threads_afterwards_as_before(
    preprocessing: Preprocessing, jpegs: list[bytes]
) -> None:
    before = torch.get_num_threads()
    inside: list[int] = []

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        inside.append(torch.get_num_threads())
        return mean_colour(pixels)

    list(stream_features(forward, preprocessing, enumerate(jpegs), batch_size=8, threads=2))
    elsewhere: list[int] = []
    thread = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert set(inside) == {1}
    assert [torch.get_num_threads(), *elsewhere] == [before, before]


def test_out_of_memory_with_one_image_ends_the_stream(preprocessing: Preprocessing, jpegs: list[bytes]) -> None:
    def forward(_pixels: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ModelError, match="out of memory with a single image"):
        list(stream_features(forward, preprocessing, enumerate(jpegs), batch_size=4, threads=1))


def test_other_errors_of_the_model_are_not_swallowed(preprocessing: Preprocessing, jpegs: list[bytes]) -> None:
    def forward(_pixels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        list(stream_features(forward, preprocessing, enumerate(jpegs), batch_size=4, threads=1))


def test_a_model_without_one_vector_an_image_is_refused(preprocessing: Preprocessing, jpegs: list[bytes]) -> None:
    with pytest.raises(ModelError, match=r"returned \(4, 3, 28, 28\)"):
        list(stream_features(lambda pixels: pixels, preprocessing, enumerate(jpegs), batch_size=4, threads=1))


def test_errors_of_the_reader_reach_the_consumer_after_what_came_before(
    preprocessing: Preprocessing, jpegs: list[bytes]
) -> None:
    def images() -> Iterator[tuple[int, bytes]]:
        yield from enumerate(jpegs[:BATCH])
        raise DigestMismatch("tar changed")

    stream = stream_features(mean_colour, preprocessing, images(), batch_size=BATCH, threads=1)
    assert len(next(stream).rows) == BATCH
    with pytest.raises(DigestMismatch, match="tar changed"):
        next(stream)
    assert not named_threads()


def test_errors_in_a_decoding_thread_reach_the_consumer(preprocessing: Preprocessing, jpegs: list[bytes]) -> None:
    def broken() -> bytes:
        raise DigestMismatch("bytes changed")

    images: list[tuple[int, Source]] = [(0, jpegs[0]), (1, broken)]
    with pytest.raises(DigestMismatch, match="bytes changed"):
        list(stream_features(mean_colour, preprocessing, images, batch_size=BATCH, threads=1))
    assert not named_threads()


def test_closing_early_stops_every_thread_and_reads_no_further(
    preprocessing: Preprocessing, jpegs: list[bytes]
) -> None:
    pulled: list[int] = []
    closed = threading.Event()

    def images() -> Iterator[tuple[int, bytes]]:
        try:
            for row in range(100_000):
                pulled.append(row)
                yield row, jpegs[row % len(jpegs)]
        finally:
            closed.set()

    stream = stream_features(mean_colour, preprocessing, images(), batch_size=BATCH, threads=2)
    next(stream)
    stream.close()
    assert closed.is_set()
    assert not named_threads()
    # The bound on what is read ahead is the bound on memory.
    assert len(pulled) <= 6 * BATCH


def named_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("feed", "features"))]

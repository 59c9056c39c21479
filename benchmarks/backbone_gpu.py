"""JPEG bytes -> features on a GPU, decode included: images a second, and the share of the measured matmul rate.

Shapes of DINOv3 with seeded weights, built on the device; 640 x 640 JPEGs, 256 x 256 pixels to the model, bf16, through
the same engine as the embed stage. Three figures belong together: the whole stream, the model alone on pixels that are
already there, and the decoding alone; the stream can at best be the slower of the other two.

    python -m benchmarks.backbone_gpu --shape vit-l --shape vit-7b [--batch 64] [--images 4096] [--no-compile]

For orientation, compiled, 256 px, without decoding, from timm's public benchmark on an RTX PRO 6000: DINOv3 S 8571,
B 3183, L 1027, H+ 418, 7B 66 images/s. On an H200, half of its bf16 matmul rate (about 790 TFLOP/s) is aimed at for 7B.
The same code runs on a CPU, where a test runs the `tiny` shape.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import RESULTS
from benchmarks.ingest import TAR_NAME, make_tar
from benchmarks.matmul import matmul_flops, transformer_flops
from spatial_core.backbones.engine import Source, stream_features
from spatial_core.backbones.forward_pass import Forward
from spatial_core.backbones.loading import choose_device
from spatial_core.backbones.preprocessing import Preprocessing, parse_preprocessing
from spatial_core.storage.hardware import usable_cores

SIDE_PX = 256
_COMMON = {"patch_size": 16, "num_register_tokens": 4, "image_size": SIDE_PX}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "vit-s": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6},
    "vit-b": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "vit-l": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "vit-7b": {
        "hidden_size": 4096,
        "intermediate_size": 8192,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "use_gated_mlp": True,
    },
}


@dataclass(frozen=True)
class Measured:
    """One shape on one device.

    Args:
        shape: name in `SHAPES`.
        device: as torch names it.
        batch: images a pass that was asked for, and `forward_size` what memory allowed.
        compiled: through torch.compile.
        stream_per_s: images a second from JPEG bytes to vectors on the host.
        model_per_s: images a second of the model alone.
        decode_per_s: images a second of decoding and resizing alone.
        matmul_tflops: best matmul rate measured on this device in bf16.
        share: of that rate, reached by the stream.
        peak_gb: most memory allocated on the GPU, 0 on a CPU.
    """

    shape: str
    device: str
    batch: int
    forward_size: int
    compiled: bool
    stream_per_s: float
    model_per_s: float
    decode_per_s: float
    matmul_tflops: float
    share: float
    peak_gb: float


def build_model(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Seeded weights, made on the device: 7B in bf16 needs 14 GB there and nothing on the host."""
    from transformers import AutoModel, DINOv3ViTConfig

    torch.manual_seed(0)
    with device:
        return AutoModel.from_config(DINOv3ViTConfig(**_COMMON, **SHAPES[shape]), dtype=dtype).eval()


def measure_shape(shape: str, device: torch.device, *, batch: int, images: int, compiled: bool = False) -> Measured:
    """Measure one shape; the first passes, which compile and tune, are not timed."""
    dtype = torch.bfloat16
    model = build_model(shape, device, dtype)
    flops = transformer_flops(model.config, SIDE_PX)
    run = torch.compile(model) if compiled else model

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = run(pixel_values=pixels.to(dtype)).last_hidden_state[:, 0]
        return vectors

    preprocessing = parse_preprocessing(
        {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": SIDE_PX, "width": SIDE_PX}}, shape
    )
    _stream(forward, preprocessing, 2 * batch, batch, device)
    stream_per_s, forward_size = _stream(forward, preprocessing, images, batch, device)
    model_per_s = _model_alone(forward, forward_size, device)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    decode_per_s, _ = _stream(lambda pixels: pixels[:, :, 0, 0], preprocessing, images, batch, device)
    matmul = matmul_flops(dtype, device, (8192, 8192, 8192) if device.type == "cuda" else (512, 512, 512))
    return Measured(
        shape=shape,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        batch=batch,
        forward_size=forward_size,
        compiled=compiled,
        stream_per_s=stream_per_s,
        model_per_s=model_per_s,
        decode_per_s=decode_per_s,
        matmul_tflops=matmul / 1e12,
        share=stream_per_s * flops / matmul,
        peak_gb=peak,
    )


def _sources(images: int) -> Iterator[tuple[int, Source]]:
    """Sixteen pictures of some 90 KB, over and over."""
    with tempfile.TemporaryDirectory() as folder:
        make_tar(Path(folder) / TAR_NAME, 16)
        with tarfile.open(Path(folder) / TAR_NAME) as tar:
            files = [tar.extractfile(member) for member in tar if member.name.endswith(".jpg")]
            pictures = [file.read() for file in files if file is not None]
    return enumerate(itertools.islice(itertools.cycle(pictures), images))


def _stream(
    forward: Forward, preprocessing: Preprocessing, images: int, batch: int, device: torch.device
) -> tuple[float, int]:
    """Images a second from bytes to vectors, and the size of the last pass."""
    sources = list(_sources(images))
    size = batch
    start = time.perf_counter()
    stream = stream_features(forward, preprocessing, sources, batch_size=batch, threads=usable_cores(), device=device)
    for done in stream:
        size = done.forward_size
    return images / (time.perf_counter() - start), size


def _model_alone(forward: Forward, batch: int, device: torch.device, passes: int = 8) -> float:
    pixels = torch.randn(batch, 3, SIDE_PX, SIDE_PX, device=device)
    with torch.inference_mode():
        forward(pixels).cpu()
        start = time.perf_counter()
        for _ in range(passes):
            vectors = forward(pixels)
        vectors.cpu()
    return passes * batch / (time.perf_counter() - start)


def table(results: list[Measured]) -> Table:
    """The results as a printable table."""
    shown = Table(title=f"images a second, bf16, {SIDE_PX} px, {usable_cores()} CPU cores")
    for name in ("shape", "device"):
        shown.add_column(name)
    for name in ("batch", "compiled", "stream", "model alone", "decode alone", "TFLOP/s", "share", "GB"):
        shown.add_column(name, justify="right")
    for each in results:
        shown.add_row(
            each.shape,
            each.device,
            f"{each.forward_size}",
            "yes" if each.compiled else "no",
            f"{each.stream_per_s:,.1f}",
            f"{each.model_per_s:,.1f}",
            f"{each.decode_per_s:,.1f}",
            f"{each.matmul_tflops:,.1f}",
            f"{100 * each.share:.0f} %",
            f"{each.peak_gb:.1f}",
        )
    return shown


def save(results: list[Measured], path: Path) -> None:
    """Write the figures as JSON."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([asdict(each) for each in results], indent=2) + "\n")


def main() -> None:
    """Command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be repeated; default vit-l and vit-7b")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--batch", type=int, default=64, help="images a forward pass")
    parser.add_argument("--images", type=int, default=4096, help="images streamed")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    results = [
        measure_shape(
            shape,
            device,
            batch=arguments.batch,
            images=arguments.images,
            compiled=arguments.compile and device.type == "cuda",
        )
        for shape in arguments.shape or ["vit-l", "vit-7b"]
    ]
    Console(width=160).print(table(results))
    save(results, RESULTS / "backbone_gpu.json")


if __name__ == "__main__":
    main()

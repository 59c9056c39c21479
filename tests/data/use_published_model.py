"""What a user of transformers does with published folders, run in an environment that knows nothing of spatial_core.

    python use_published_model.py RESULTS_FOLDER MODEL_FOLDER...

writes RESULTS_FOLDER/<model>.npz and prints one JSON object. A head published alone finds its backbone in `backbone`
beside its folder.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, pipeline


def use(folder: Path, results: Path) -> dict[str, Any]:
    """Load, check, embed the shipped pictures in every way there is, save, load again."""
    images = [Image.open(folder / name) for name in json.loads((folder / "golden.json").read_text())["images"]]
    whole = json.loads((folder / "config.json").read_text())["include_backbone"]
    model, loaded = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    model.eval()
    found: dict[str, Any] = {"faults": [str(key) for name in loaded for key in loaded[name]]}
    found["golden_as_loaded"] = model.check_golden()
    if not whole:
        model.load_backbone(folder.parent / "backbone")
    found["golden"] = model.check_golden()

    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.inference_mode():
        outputs = model(**processor(images=images, return_tensors="pt"))
    found["fields"] = list(outputs)
    found["pooler_is_embeddings"] = outputs.pooler_output is outputs[0] is outputs.embeddings
    vectors = {"direct": outputs.embeddings.numpy()}
    if whole:
        extract = pipeline("image-feature-extraction", model=str(folder), trust_remote_code=True)
        vectors["pipeline"] = np.array(extract(images, batch_size=2))[:, 0]
        vectors["pipeline_pooled"] = np.array(extract(images, pool=True))[:, 0]
    np.savez(results / f"{folder.name}.npz", **vectors)

    saved = results / f"saved-{folder.name}"
    model.save_pretrained(saved)
    again = AutoModel.from_pretrained(saved, trust_remote_code=True).eval()
    with torch.inference_mode():
        repeated = again(features=outputs.features).embeddings
    found["saved_again_difference"] = float((repeated - outputs.embeddings).abs().max())
    found["saved_again_bytes"] = (saved / "model.safetensors").stat().st_size
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "transformers": transformers.__version__,
        "knows_spatial_core": importlib.util.find_spec("spatial_core") is not None,
    }
    report |= {folder.name: use(folder, Path(sys.argv[1])) for folder in map(Path, sys.argv[2:])}
    print(json.dumps(report))  # noqa: T201 - the answer to the test that runs this

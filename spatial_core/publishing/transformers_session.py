"""Talking to transformers without its side effects: no progress bars on stderr, no code left in its cache."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoModel
from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silence progress bars and advice for the length of the block."""
    bars = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def plainly_loaded(folder: Path) -> Iterator[tuple[Any, Any]]:
    """(model, image processor) as any user of transformers gets them, with the code shipped in `folder`.

    transformers copies that code into its module cache under the folder's name, which is temporary here: the copy is
    removed at the end.
    """
    with quietly():
        options = {"trust_remote_code": True, "local_files_only": True}
        model = AutoModel.from_pretrained(folder, **options).eval()
        processor = AutoImageProcessor.from_pretrained(folder, **options)
    try:
        yield model, processor
    finally:
        for kind in {type(model), type(model.config), type(processor)}:
            _forget(kind.__module__)


def _forget(module_name: str) -> None:
    module = sys.modules.pop(module_name, None)
    path = Path(str(getattr(module, "__file__", None) or ""))
    for parent in path.parents:
        if parent.parent.name == "transformers_modules":
            shutil.rmtree(parent, ignore_errors=True)

"""Generated Python: written to the cache under a name of its content, imported from there, where Triton reads it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from types import ModuleType

from dualop import build
from dualop.errors import BackendUnavailable


def imported(text: str) -> ModuleType:
    """The module of this text. Raises BackendUnavailable where the cache cannot be written to."""
    name = f"triton_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    folder = build.cache_folder()
    path = folder / f"{name}.py"
    try:
        if not path.exists() or path.read_text() != text:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
                file.write(text)
            os.replace(file.name, path)
    except OSError as error:
        raise BackendUnavailable(
            f"cannot write to {folder} ({error}): set DUALOP_CACHE_DIR to a folder that is writable"
        ) from error
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

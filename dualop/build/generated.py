"""Write generated Python to a file of the cache, named after its content, and import it: Triton reads the file."""

from __future__ import annotations

import hashlib
import importlib.util
from types import ModuleType

from dualop.build import cache, locks


def imported(text: str) -> ModuleType:
    """Return the module with this text. Raises BackendUnavailable where the cache cannot be written to."""
    name = f"triton_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    folder = cache.folder()
    path = folder / f"{name}.py"
    try:
        if not path.exists() or path.read_text("utf-8") != text:
            folder.mkdir(parents=True, exist_ok=True)
            cache.write(path, text)
    except OSError as error:
        raise cache.unwritable(error) from error
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with locks.brief:  # the first generated module imports triton
        spec.loader.exec_module(module)
    return module

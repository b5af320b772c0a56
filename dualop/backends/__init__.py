"""Run one chain each: every backend is one module, which knows nothing of the others."""

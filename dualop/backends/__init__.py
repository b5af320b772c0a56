"""One module a backend; each launches one chain and knows nothing of the others."""

"""Turn source text into loaded code: cache, locks, compilers, generated files. It knows no chain and no tensor."""

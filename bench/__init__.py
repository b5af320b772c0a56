"""Benchmarks: `workloads` says what is run, `timing` how long it takes, `measure` puts both together, `table` prints.

Also importable as `dualop.bench`; the command is `dualop bench`.
"""

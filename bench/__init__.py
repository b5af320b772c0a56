"""Measure chains: `workloads` defines what is run, `timing` times it, `measure` combines both, `table` prints.

Also importable as `dualop.bench`; the command is `dualop bench`.
"""

"""What PyTorch's own operators can do, tried with a chain: one check a function, each a row of a table.

A check takes a `Case` (case.py) and raises what it finds wrong; its docstring is the row's text. Each compares with
torch's own functions, most on the chain `add | swish | tanh | gelu | hardtanh(-1, 1)` in float64. To add a row, write a
function in the module of its group (rows.py lists them).

    pytest tests/torch_contract                                                # each row on each backend
    pytest tests/torch_contract --table docs/torch_contract/torch-2.13.md      # and write the table

This package imports dualop and nothing of dualop imports it.
"""

"""Judge results against the truth in float64: `check` on samples, `verify` on every number. It knows no command line.

Both use one truth (truth.py), one measure (ulp.py), inputs of one module (cases.py) and one report (report.py).
"""

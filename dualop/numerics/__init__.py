"""Judge results: the truth in float64, ulps, the cases of the cross-check, all numbers. It knows no command line."""

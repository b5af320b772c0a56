"""The truth in float64, ulps, the cases of the cross-check, every number of a dtype. It knows no command line."""

"""Describe how a call lies in memory and is cut into blocks. It knows shapes, strides and GPUs, and no kernel."""

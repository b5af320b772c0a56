"""What this machine has of what dualop needs, and what to advise. It knows no chain, and asks in child processes."""

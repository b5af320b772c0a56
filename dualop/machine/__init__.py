"""Find out what this machine has and lacks, and what to advise. It knows no chain, and asks in child processes."""

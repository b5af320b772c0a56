"""`python -m dualop` is the command `dualop`."""

from dualop.cli import main

if __name__ == "__main__":  # a process that is spawned to compile imports this file again
    main()

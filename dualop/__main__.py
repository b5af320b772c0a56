"""Run the command `dualop` by `python -m dualop`."""

from dualop.cli import main

if __name__ == "__main__":  # a process that is spawned to compile imports this file again
    main()

"""Lets `python -m qmoe_rules.cli` run the command."""

import sys

from qmoe_rules.cli import main

if __name__ == "__main__":
    sys.exit(main())

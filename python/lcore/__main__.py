"""`python -m lcore` is the command `lcore`."""

from lcore.cli import main

main()

"""`python -m rkcached` is `rkcached`."""

from rkcached.cli import main

main()

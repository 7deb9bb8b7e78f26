"""`python -m bevt`: the command line without an installed script."""

from bevt.cli import main

main()

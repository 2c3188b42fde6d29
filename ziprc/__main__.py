"""`python -m ziprc`: the same as the command `ziprc`, where only the checkout is on the path, as in a container."""

from ziprc.cli import main

main()

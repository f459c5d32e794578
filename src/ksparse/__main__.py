"""`python -m ksparse`, for torchrun, and where the command `ksparse` is not on the path."""

from ksparse.cli import main

main()

"""`python -m ksparse`, for torchrun and for where the command is not on the path."""

from ksparse.cli import main

main()

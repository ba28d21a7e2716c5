"""`python -m qcompiler`."""

from qcompiler.cli import main

main()

"""`python -m growfx`."""

from growfx.cli import main

main()

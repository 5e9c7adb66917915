"""`python -m var_compressor.cli` is `varc`."""

from var_compressor.cli.app import main

main()

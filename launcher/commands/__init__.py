"""One module per group of commands; `cli.py` imports the one that is called."""

"""The command line: a module for each command, `app.py` for all of them together."""

"""Settings of a run: run.yaml and the command line -> checked values, and back to text.

Others use `load` (read, check, write), `sections` (the values) and `batch` (nodes of a job);
`field` says what a setting is.
"""

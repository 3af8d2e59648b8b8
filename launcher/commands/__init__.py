"""What `motet` can be asked: one file for each command, with `arguments(parser)` and `run`.

A group, such as `motet data`, is a folder. `cli.COMMANDS` lists them; `options` has the arguments
that several commands share.
"""

"""Starting the ranks of a run on this machine, and watching them: torchrun, its command, its end.

Others use `local.train` and what it is made of, `command` (settings to text, pure), `agent`
(signals and left-over processes) and `joining` (several machines by hand).
"""

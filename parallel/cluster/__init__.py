"""Machines and the links between them, described or measured. No torch outside `probe`.

Others use `description` (the values), `file` (cluster.yaml), `devices` (the catalogue),
`this_machine`, and `calibration` with `constants` (of the cost model).
"""

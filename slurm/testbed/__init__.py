"""A private Slurm of four nodes on one machine, in network namespaces: for tests and trials.

Others use `bed.Testbed`, the names in `shape`, and `needs.missing` (what the machine lacks).
"""

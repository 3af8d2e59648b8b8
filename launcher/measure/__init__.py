"""Measuring instead of assuming: `motet cluster probe`, and the short run that calibrates a plan.

Others use `cluster_launch.run`, `slurm_cluster.cluster_from_slurm` and `calibration_run`.
"""

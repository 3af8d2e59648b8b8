"""The testbed, for every test of this folder."""

from tests.slurm.bed_fixture import healed, testbed

__all__ = ["healed", "testbed"]

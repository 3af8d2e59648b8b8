"""`motet slurm testbed`: a private Slurm on this machine."""

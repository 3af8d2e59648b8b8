"""What a run does and did, from its folder and from Slurm's records: the ground of `motet status`,
`logs`, `cancel` and `ls`.

Nothing here writes into a run, holds its lock or imports torch.
"""

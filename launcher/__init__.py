"""The front door and one run's life: `cli` lists the commands, `worker` is what torchrun starts,
`node` what a batch job starts. Every folder says what it is for.
"""

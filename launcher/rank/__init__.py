"""What torchrun starts on every rank: the step loop, its hooks, checkpoints, metrics and stops.

Others use `worker` (what runs), `hooks` (Hook), `checkpoint`, `probing`, `progress` and `stop`.
"""

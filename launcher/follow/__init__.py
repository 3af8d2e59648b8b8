"""What a run does and did, from its folder and its scheduler's records: `status`, `logs`, `cancel`.

Others use `overview.look` (many runs at once), `state`, `logs.Merged` and `stopping.actions`.
Nothing here writes into a run, holds its lock or imports torch.
"""

"""Slot to sequence: the clean stream, the exposures laid over it, and proof of what was consumed.

Others use `stream.Stream`, `placement` (where exposures go), `claims` (ranges of tokens),
`exposure_plan` (the file of exposures), `random` (draws that are addressed by names),
`batch_sizes.Steps`, `ledger` and `audit`.
"""

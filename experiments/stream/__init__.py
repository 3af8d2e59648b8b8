"""Slot to sequence: the clean stream, the exposures laid over it, and proof of what was consumed.

Others use `stream.Stream`, `exposure_plan`, `placement` (where exposures go), `random` (draws that
are addressed by names), `batch_sizes.Steps`, `ledger` and `audit`.
"""

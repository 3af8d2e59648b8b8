"""The experiments of one run: `before_training` (check, power, preview, freeze), `after_training`
(audit, measured outcomes), and `slot_view` (one sequence in words). Nothing runs while it trains.
"""

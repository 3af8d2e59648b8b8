"""How one run is split over ranks: a checked value, and the weights and collectives that follow.

Others use `layout.Layout`, `rules.problems`, `weights.weights` and `collectives.step_collectives`.
"""

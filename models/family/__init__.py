"""Families: the models that one run delivers, and how they share its weights.

Others use `base` (Member, Term, Family, TrainingStage, members_of), `registry` (FAMILIES) and
`poa_list` (poa_weights, draw).
"""

"""Families: the models that one run delivers, and how they share its weights.

Others use `base` (Member, Term, Family, TrainingStage, FAMILIES, members_of) and
`poa_list` (poa_weights, draw).
"""

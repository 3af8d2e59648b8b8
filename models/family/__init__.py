"""Families: the models that one run delivers, and how they share its weights.

Others use `base` (Member, Family, TrainingStage, FAMILIES, members_of, member_weights) and
`poa_list` (poa_weights, draw).
"""

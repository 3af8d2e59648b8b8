"""How a model becomes a larger or a smaller one: operators on weights and their optimizer state.

An operator, by its name in `registry.py`, is asked about two configs and gives a `Growth`: of every
weight of the second model how it is made from weights of the first, one tensor at a time.
"""

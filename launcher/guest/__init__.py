"""Motet's experiments inside somebody else's training loop.

Others use `guest` (Guest), which is also `motet.Guest`.
"""

"""The built-in experiments, one module each, and the way to a class of the user's own.

Others use `kinds.Library` (what `use:` means) and `kinds.LIBRARY`.
"""

"""`motet plan`: `ask` has its arguments and what it does; the others are its parts, by what is
asked.
"""

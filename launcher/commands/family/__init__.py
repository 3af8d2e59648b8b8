"""`motet family show`: the members of a family."""

"""`motet family`: the members of a run's family, how far they lie apart, and how they draft."""

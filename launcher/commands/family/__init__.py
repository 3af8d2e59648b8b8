"""`motet family`: the members of a run.yaml's family, and how they draft for each other."""

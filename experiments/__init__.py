"""What is asked of a run, in the order that data flow: corpora, stream, design, library, scoring,
analysis. Imports go the other way only: design reads stream, library reads design, and so on.

Words, first to last: a *unit* is assigned to an *arm*; an *exposure* shows it in the stream; the
*ledger* keeps what was consumed; *item scores* are what a probe read off the model; *measured* is
an experiment with all its scores; an *outcome* is one number per unit, made from them; an
*estimate* compares arms; an *answer* is the primary estimate with all beside it; a *verdict* is an
answer in words. `types` has what passes between the folders.
"""

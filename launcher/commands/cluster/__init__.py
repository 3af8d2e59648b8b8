"""`motet cluster probe | show`: what the machines and their links really are."""

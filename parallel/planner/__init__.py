"""The search for the fastest layout on some machines, what a budget allows, why another layout is
slower. Pure; no torch.

For others: `best_first.plan` with `question` (`PlanQuestion`, `PlanAnswer`, `RankedLayout`);
`space.Limits`; `reasons`; `budget`; `which_probe`; `placement.trimmed`. How the search proves its
answer: docs/planner_internals.md.
"""

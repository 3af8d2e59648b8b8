"""Where a model is trained: layouts, the machines they run on, and what they cost there.

`layout`, `cluster`, `cost` and `planner` decide without torch; `engines` and `runtime` carry out.
"""

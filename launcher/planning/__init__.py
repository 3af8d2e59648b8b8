"""Pages, tables and drawings of plans, layouts and clusters; predictions of a run beside what was
measured. `run_facts` says what a run will be; the search itself lies in parallel/planner.
"""

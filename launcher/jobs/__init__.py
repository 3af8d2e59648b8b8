"""A run as a batch job: the scheduler protocol, submitting, what a job does around its step.

Others use `scheduler.Scheduler` and its values, `schedulers` (which one a run has), `submission`
(settings to jobs), `forecast`; jobs themselves run `batch`, `job` and `node`.
"""

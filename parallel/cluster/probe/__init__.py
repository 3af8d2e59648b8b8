"""What machines and links really do, measured by ranks on them.

Others use `survey.survey` (all ranks measure) and `result` (measurements -> a cluster).
"""

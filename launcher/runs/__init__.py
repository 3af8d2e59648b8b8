"""The run folder and what lies in it: one class, `rundir.RunDir`, owns every path; `manifest`,
`metrics` and `attempts` read and write its files, `snapshot` keeps the code, `begun` guards it.
"""

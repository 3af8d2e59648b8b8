"""What people and programs read: `terminal` prints tables, facts and JSON; `page` makes HTML files
of one kind. It knows nothing of runs.
"""

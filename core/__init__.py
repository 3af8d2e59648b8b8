"""What every room needs and none owns.

`errors` (one root for users' mistakes), `files` (whole or absent), `cache` (what can be computed
again), `hashing`, `schema` (reading mappings), `format` (numbers in words), `yaml_text`,
`processes`, `plugins`, `jobs` and `hostlist` (a scheduler's words).
"""

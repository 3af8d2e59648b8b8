"""How likely a model finds each probe item, and the files that keep it.

Others use `probes` (encode_items, score_items) and `store` (read_probe, write_probe).
"""

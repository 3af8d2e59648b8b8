"""`motet data prepare | index | inspect`: text to token shards, and what is in them."""

"""`motet data prepare | index | inspect | sample`: text to token shards, and what is in them."""

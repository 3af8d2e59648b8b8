"""`motet experiments list | check | power | preview | scan | audit`: questions, before they
cost."""

"""`motet experiments list | check | power | preview | audit`: questions, seen before they cost."""

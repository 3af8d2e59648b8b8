"""Text to token shards on disk, and other people's token files read as they are.

Others use `corpus.Corpus`, `tokenizer.Tokenizer`, `prepare` (text to shards), `indexed` (foreign
files) and `inspection` (what is in a corpus).
"""

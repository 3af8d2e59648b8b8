"""What trains a model: one protocol, and the engines behind it.

Others use `protocol` (Engine, EngineOptions, ENGINES, build_engine) and nothing of one engine.
"""

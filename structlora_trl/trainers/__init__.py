"""The method in `transformers.Trainer` and TRL's trainers: the callback, the mixin, and what depends on their
versions.
"""

"""The method in `transformers.Trainer` and TRL: the callback, the mixin, and what depends on versions."""

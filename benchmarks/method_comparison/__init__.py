"""A row for StructLoRA in PEFT's own `method_comparison`."""

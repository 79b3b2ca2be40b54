"""Stands in for torchaudio, which LLaMA-Factory imports and these tests do not use; its wheels need the CUDA build of torch."""

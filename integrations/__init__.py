"""Front doors of trainers that are configured by a file: Axolotl, LLaMA-Factory and ms-swift. Each brings the
callback, no more.
"""

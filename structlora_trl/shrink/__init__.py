"""A finished adapter, as a Python API: read and checked, inspected, pruned, exported, plotted."""

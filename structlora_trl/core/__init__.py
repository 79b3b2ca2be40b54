"""The method of the paper, on torch alone: gates, depth graph, coordinator, the map of a kind, and the kinds
of a model.
"""

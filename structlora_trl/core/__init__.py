"""The method of the paper, on torch alone: gates, depth graph, coordinator, a kind's map, a model's kinds."""

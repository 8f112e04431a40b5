"""Grouped projections found in a graph, and routed to operators."""

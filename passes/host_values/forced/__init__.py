"""Other outcomes of host values than the present data has, forced in a graph and in the step."""

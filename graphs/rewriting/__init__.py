"""A step without host values as a candidate: the rewritten graph, replays that are checked, proofs."""

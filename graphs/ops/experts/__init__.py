"""Products of each row with the weight of the expert that it was routed to."""

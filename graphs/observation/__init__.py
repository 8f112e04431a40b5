"""An eager run looked at: operators, host reads, times."""

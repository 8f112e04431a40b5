"""Values that the recorded run read, compared at every call."""

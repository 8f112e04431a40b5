"""The contract between a caller and a recording: arguments, slots, buckets, padding, static tensors, state."""

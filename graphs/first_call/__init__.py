"""The first call of a signature: observe, record, verify, measure."""

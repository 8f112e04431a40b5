"""Steps whose host syncs the passes take out."""

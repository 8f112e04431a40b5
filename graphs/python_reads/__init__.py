"""What the Python of a run asks for: functions, names, calls that nobody can guard."""

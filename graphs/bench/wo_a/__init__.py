"""The grouped projection by path, groups and tokens, held against its bars."""

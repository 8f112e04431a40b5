"""Recordings whose static tensors moved: the same recording, pointed at other memory."""

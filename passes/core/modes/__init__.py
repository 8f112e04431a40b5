"""What function modes and dispatch modes have to know of whom they are called by."""

"""Decode steps of DeepSeek-V4: eager, recorded, and with each rewrite added."""

"""Runs of the commands, from settings to files."""

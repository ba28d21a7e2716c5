"""Viewers: they read a history and nothing else."""

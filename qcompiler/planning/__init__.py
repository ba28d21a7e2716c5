"""Bits where they matter: sensitivity × cost × allocation, as a plan to be read and edited."""

"""Conversion of adapters, and the check that the outputs agree."""

"""Guests in files."""

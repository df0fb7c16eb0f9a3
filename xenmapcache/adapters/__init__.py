"""Bridges to other programs, which then read a guest's memory through a map cache."""

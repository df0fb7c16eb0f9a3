"""Tests of what is made of events."""

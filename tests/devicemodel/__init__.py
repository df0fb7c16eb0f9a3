"""Tests of the device kit on the mock."""

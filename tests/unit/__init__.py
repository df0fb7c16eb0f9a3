"""Tests of single modules over the mock."""

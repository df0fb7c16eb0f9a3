"""The package, broken on purpose in many places: each break must fail a test."""

"""Properties, found by hypothesis against plain models."""

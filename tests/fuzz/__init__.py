"""Corrupt files, made by machine: whatever their content, the answer is CorruptImageError."""

"""Files that lie, made by machine: whatever is in them, the answer is CorruptImageError."""

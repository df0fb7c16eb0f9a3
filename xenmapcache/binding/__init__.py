"""The only code that knows C: declarations, loaders, and checked calls into Xen's libraries."""

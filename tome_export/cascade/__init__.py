"""A budget for each image, out of several artifacts."""

from tome_export.cascade.main import CascadeRequest, cascade, members_of

__all__ = ["CascadeRequest", "cascade", "members_of"]

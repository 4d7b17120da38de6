"""placeholder, replaced by its first content."""

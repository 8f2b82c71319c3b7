"""Pictures, drawn with matplotlib alone."""

"""Tables and pages of finished runs."""

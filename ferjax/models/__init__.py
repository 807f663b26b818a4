"""One family of networks a file; `layers` holds what they share."""

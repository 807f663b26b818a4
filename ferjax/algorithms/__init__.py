"""One training method a file; `base` holds the contract that they share."""

"""Numbers: how floats become codes, and what that costs."""

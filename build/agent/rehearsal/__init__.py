"""A management server's part, played against a system VM."""

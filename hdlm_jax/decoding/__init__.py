"""One sampling loop, and every decoding method of the field as a policy of it."""

"""Other servers, and the load generator that both sides are measured with."""

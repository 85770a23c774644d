"""Front ends: ways in which requests reach the protocol layer."""

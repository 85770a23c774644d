"""What operating costs: telemetry, TLS, tokens, greedy neighbours, starting, the page."""

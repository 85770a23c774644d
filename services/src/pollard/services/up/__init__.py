"""`pollard serve` and `pollard up`: services as processes, and the supervisor over them."""

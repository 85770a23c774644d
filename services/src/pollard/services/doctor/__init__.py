"""`pollard doctor`: whether this machine can run Pollard, and what it lacks."""

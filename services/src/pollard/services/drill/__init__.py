"""`pollard drill`: an operator's own proof, on their own machine, of what Pollard promises."""

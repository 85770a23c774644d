"""`python -m pollard.client.cli`: the `pollard` command where its script is not on the path."""

from pollard.client.cli import main

main()

"""What is told of calls while they run: their ids, the access log, and traces."""

"""One process that samples for others: an HTTP API, tools for agents, a page."""

"""Calls between processes: server, client, and the chain around every handler."""

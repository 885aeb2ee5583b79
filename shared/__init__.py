"""Plumbing that knows no service: errors, identity, data, RPC, bus."""

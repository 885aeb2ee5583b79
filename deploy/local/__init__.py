"""Starts nats-server, Valkey, services and edge as processes of this machine."""

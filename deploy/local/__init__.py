"""Starts the embedded mesh as processes, keeps it running, and leaves nothing behind.

Nothing here loads gRPC: a process that has loaded it must not fork.
"""

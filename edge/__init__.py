"""REST in, gRPC out; no code per service."""

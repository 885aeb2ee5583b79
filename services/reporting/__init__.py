"""Reporting: sums per day, fed by events.

Owns daily sums (partial, in the bucket of the event that moved them, added up on read),
watermarks and report runs. Serves tenfold.reporting.v1; emits nothing. It reads the events
of payment, media and auth, counts each once, and says in every answer how far it has read.
"""

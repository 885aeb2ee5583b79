"""Owns accounts, transactions and their entries; serves tenfold.ledger.v1.

Emits AccountOpened and TransactionPosted. Double entry is enforced by the database's
constraints and triggers: the domain decides first and says why it refuses, and the database
cannot be talked into anything else.
"""

"""Quotas: arithmetic, plans and names that the edge and the operator's commands share."""

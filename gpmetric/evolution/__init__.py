"""The search for metrics: variation, evaluation, survival, and the ledger that remembers all of it."""

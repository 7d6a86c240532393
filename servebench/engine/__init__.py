"""WHEN it happens for real: pacing, issuing, worker processes, and the check of what came back."""

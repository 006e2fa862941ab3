"""Rollouts: what a policy writes is rewarded, and becomes the batches of its next steps."""

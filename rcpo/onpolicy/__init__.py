"""Pairs of answers that the policy itself wrote: sampled, scored, paired; and rounds of training on them."""

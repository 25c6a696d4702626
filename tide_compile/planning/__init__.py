"""Planning: what tokens cost, and what can be had for which disagreement."""

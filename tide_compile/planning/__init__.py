"""Planning: what tokens cost, what exits would bring on a device, and what can be had for which disagreement."""

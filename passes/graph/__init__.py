"""Helpers of the passes that know no plan: questions about FX graphs, costs, what operators do to rows."""

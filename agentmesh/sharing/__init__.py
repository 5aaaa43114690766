"""KV that outlives one prompt: stores and budgets."""

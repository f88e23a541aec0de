"""Speech with phones: where it comes from, what a model hears of it, and how well it does."""

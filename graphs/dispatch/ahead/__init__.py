"""Recording sizes ahead of serving: from one example to a call of each size, in a budget of memory, with progress shown."""

"""How fast it is: against a plain loop, and against the same loop with every trick."""

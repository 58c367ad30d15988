"""Which layers may share attention, what it costs, and which plan to take."""

"""Re-fits a student in closed form, by regressions from its states to its teacher's."""

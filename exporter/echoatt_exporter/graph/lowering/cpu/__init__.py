"""What only the CPU's lowering does."""

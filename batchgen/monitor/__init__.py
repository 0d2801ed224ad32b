"""What a run shows of itself, and how it hears that it is to stop."""

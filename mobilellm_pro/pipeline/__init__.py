"""What spans several runs (floor 3)."""

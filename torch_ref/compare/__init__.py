"""What sets both frameworks side by side."""

"""The loop, and all that it leaves on the disk."""

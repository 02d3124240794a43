"""Which images there are, which of them a step sees, and what becomes of their pixels."""

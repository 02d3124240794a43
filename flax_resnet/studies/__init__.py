"""Named experiments: recipes, sweeps, measurements, tables and figures."""
